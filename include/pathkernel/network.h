/* pathkernel/network.h: the network language and the initialisation of weights.
 *
 *     input 64; dense 32; tanh; dense 32 nobias; leaky_relu 0.01; dense 10
 *
 * Layers are separated by `;`, words by blanks. `input 64` or `input 1x28x28` comes first. Parameters are in
 * PyTorch's order: layers in order, each layer's weight (out, in), then its bias.
 */
#ifndef PATHKERNEL_NETWORK_H
#define PATHKERNEL_NETWORK_H
#include "operation.h"
#include "random.h"

/* >>> declarations */
PK__BEGIN_C

/* Builds the graph that text describes into a zeroed graph; graph->text is the text with single blanks.
 * PK_FORMAT, PK_ARGUMENT or PK_SHAPE name the layer and the word; the graph stays zeroed then. */
PK_API PK__MUST_USE pk_status pk_network_parse(pk_context *context, const char *text, pk_graph *graph);

/* weights (P) = PyTorch's default initialisation: each layer's weights and biases uniform in
 * +-1/sqrt(fan-in), from the generator with this seed, one stream per layer. */
PK_API PK__MUST_USE pk_status pk_network_initialize(pk_context *context, const pk_graph *graph, uint64_t seed,
                                                    pk_real *weights);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_NETWORK_IMPLEMENTED)
#define PATHKERNEL_NETWORK_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_C

enum { PK__LAYER_WORDS = 16, PK__LAYER_TEXT = 256, PK__NETWORK_LAYERS = 10000 };

/* "64" or "1x28x28" as a shape. */
static pk_status pk__parse_shape(pk_context *context, const char *word, pk_shape *shape)
{
    const char *at = word;
    shape->rank = 0;
    do {
        size_t dim = 0;
        if (shape->rank == PK_SHAPE_RANK || *at < '0' || *at > '9')
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

static pk_status pk__add_layer(pk_context *context, pk_graph *graph, int count, const char *const *words)
{
    if (!graph->node_count) {
        pk_shape shape;
        if (strcmp(words[0], "input") != 0 || count != 2)
            return pk__fail(context, PK_FORMAT, "a network starts with 'input' and its shape, not with '%.40s'",
                            words[0]);
        pk_status status = pk__parse_shape(context, words[1], &shape);
        return status ? status : pk_graph_input(context, graph, &shape);
    }
    const pk_operation *operation = pk_operation_find(words[0]);
    if (!operation)
        return pk__fail(context, PK_FORMAT, "'%.40s' is not a layer that is known", words[0]);
    double attributes[PK_NODE_ATTRIBUTES];
    memcpy(attributes, operation->defaults, sizeof attributes);
    if (operation->parse) {
        pk_status status = operation->parse(context, count - 1, words + 1, attributes);
        if (status)
            return status;
    } else {
        if (count - 1 > operation->parameters)
            return pk__fail(context, PK_FORMAT, "%s takes at most %d numbers; '%.40s' is one too many",
                            words[0], operation->parameters, words[operation->parameters + 1]);
        for (int i = 1; i < count; i++) {
            pk_status status = pk__parse_number(context, words[i], &attributes[i - 1]);
            if (status)
                return status;
        }
    }
    int input = (int)graph->node_count - 1;
    return pk_graph_add(context, graph, operation, 1, &input, attributes, NULL);
}

static int pk__is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

/* One layer: copies the words from [*at, `;` or the end) into words, single blanks between, moves *at on. */
static pk_status pk__split_layer(pk_context *context, const char **at, char *text, int *count,
                                 const char **words)
{
    size_t used = 0;
    const char *from = *at;
    *count = 0;
    while (*from && *from != ';') {
        if (pk__is_blank(*from)) {
            from++;
            continue;
        }
        if (*count == PK__LAYER_WORDS)
            return pk__fail(context, PK_FORMAT, "more than %d words", PK__LAYER_WORDS);
        words[(*count)++] = text + used;
        while (*from && *from != ';' && !pk__is_blank(*from)) {
            if (used + 2 > PK__LAYER_TEXT)
                return pk__fail(context, PK_FORMAT, "more than %d characters", PK__LAYER_TEXT - 2);
            text[used++] = *from++;
        }
        text[used++] = 0;
    }
    *at = from;
    return *count ? PK_OK : pk__fail(context, PK_FORMAT, "no words; two ';' in a row, or one at the end?");
}

static pk_status pk__parse_layers(pk_context *context, const char *text, pk_graph *graph)
{
    char layer[PK__LAYER_TEXT];
    const char *words[PK__LAYER_WORDS];
    char *canonical = graph->text;
    for (int number = 1;; number++) {
        int count = 0;
        pk_status status = number > PK__NETWORK_LAYERS
                               ? pk__fail(context, PK_FORMAT, "more than %d layers", PK__NETWORK_LAYERS)
                               : pk__split_layer(context, &text, layer, &count, words);
        if (!status)
            status = pk__add_layer(context, graph, count, words);
        if (status) {
            char message[PK_MESSAGE_SIZE] = "";
            if (context)
                memcpy(message, context->message, sizeof message);
            return pk__fail(context, status, "network, layer %d: %.400s", number, message);
        }
        for (int i = 0; i < count; i++) {
            size_t length = strlen(words[i]);
            memcpy(canonical, words[i], length);
            canonical += length;
            *canonical++ = i + 1 < count ? ' ' : ';';
        }
        if (!*text) {
            canonical[-1] = 0;
            break;
        }
        text++;
        *canonical++ = ' ';
    }
    if (!graph->parameters)
        return pk__fail(context, PK_ARGUMENT, "network: it has no weights, so nothing can be trained");
    return PK_OK;
}

PK_API pk_status pk_network_parse(pk_context *context, const char *text, pk_graph *graph)
{
    if (!text || graph->node_count)
        return pk__fail(context, PK_ARGUMENT,
                        text ? "network: the graph is in use already" : "network: no text");
    /* A blank after each ';' makes the canonical text at most twice as long. */
    pk_status status = pk_allocate(context, 2 * strlen(text) + 2, 1, "the network's text", &graph->text);
    if (!status)
        status = pk__parse_layers(context, text, graph);
    if (status)
        pk_graph_release(context, graph);
    return status;
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
        double bound = 1 / sqrt((double)graph->nodes[node->inputs[0]].width);
        for (size_t i = 0; i < node->weight_count; i++)
            weights[node->weight_offset + i] = (pk_real)(bound * (2 * pk_random_uniform(&random) - 1));
    }
    return PK_OK;
}

PK__END_C
/* <<< implementation */
#endif
