/* pathkernel/network/language.h: the network language and the initialization of weights.
 *
 *     input 64; dense 32; tanh; dense 32 nobias; leaky_relu 0.01; dense 10
 *     input 1x8x8; conv 8 3x3 pad=1; relu; residual( conv 8 3x3 pad=1; relu | conv 8 1x1 ); flatten; dense 10
 *
 * Layers are separated by `;`, words by blanks. `input 64` or `input 1x28x28` comes first. Most layers are one
 * operation of the same name with its options, built in or from outside (pk_context.operations); what is made of
 * several is in the table pk__composites. Parameters are
 * in PyTorch's order: layers in order, the branches of a residual in order, each layer's weight, then its bias.
 */
#ifndef PATHKERNEL_LANGUAGE_H
#define PATHKERNEL_LANGUAGE_H
#include "../data/array.h"
#include "operations.h"

/* >>> declarations */
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

/* The names of the layers one by one, such as "dense"; NULL behind the last one. */
PK_API const char *pk_network_layer(size_t index);

/* The arrays that the network language named when graph was built; graph has to outlive the result. */
PK_API pk_constants pk_graph_constants(const pk_graph *graph);
/* The node behind `after` (NULL: the first) that holds a named array, with the array's view; NULL where there is none. */
PK_API const pk_node *pk_graph_named(const pk_graph *graph, const pk_node *after, pk_array *array);

/* weights (P) = each layer's own initialization, for most PyTorch's default: weights and biases uniform in
 * +-1/sqrt(fan-in), from the generator with this seed, one stream per layer. */
PK_API PK__MUST_USE pk_status pk_network_initialize(pk_context *context, const pk_graph *graph, uint64_t seed,
                                                    pk_real *weights);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_LANGUAGE_IMPLEMENTED)
#define PATHKERNEL_LANGUAGE_IMPLEMENTED
/* >>> implementation */
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

/* A layer that named itself, and the nodes it is made of. */
typedef struct pk__named_layer {
    char name[PK_CONSTANT_NAME];
    size_t first, last; /* nodes first .. last - 1; of a value that `as` names, first alone, and last == 0 */
} pk__named_layer;

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
    pk__named_layer *named; /* the layers with names so far */
    size_t named_count, named_capacity;
    size_t frequencies; /* numbers drawn for fourier so far */
    pk__layer layer;    /* the layer in hand: of all depths, so that the stack holds none */
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
    "attention as from add subtract divide concat slice permute mean max min prelu softmin group_norm " \
    "instance_norm"

/* Operations that the language builds only as parts of its layers. */
static int pk__is_part(const char *name)
{
    return strcmp(name, "concatenate") == 0 || strcmp(name, "view") == 0;
}

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
        if (!pk__is_part(operation->name) &&
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
    if (status)
        return status;
    status = pk_allocate(parser->context, pk_array_items(array), sizeof **numbers, "constants", numbers);
    if (status)
        return status;
    pk_array_reals(array, 0, pk_array_items(array), *numbers);
    for (size_t i = 0; i < pk_array_items(array); i++)
        if (!isfinite((*numbers)[i]))
            return pk__fail(parser->context, PK_NOT_FINITE, "the array '%.40s' has a number that is not finite",
                            name);
    return PK_OK;
}

/* The shape of the branch in hand. */
static const pk_shape *pk__branch_shape(const pk__parser *parser)
{
    return &parser->graph->nodes[parser->node].shape;
}

/* dense and conv, `ntk` [w_std=] [b_std=]: the NTK parameterization y = w_std / sqrt(fan_in) W x + b_std b with
 * standard normal W and b (Jacot et al. 2018, section 2; Lee et al. 2019, eq. 1), as scaled inputs and outputs. */
enum { PK__NTK_FLAG, PK__NTK_WEIGHTS, PK__NTK_BIASES };
static const pk_option pk__ntk_options[] = {
    {.name = "ntk", .kind = PK_OPTION_FLAG, .attribute = PK__NTK_FLAG, .least = 1},
    {.name = "w_std",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK__NTK_WEIGHTS,
     .least = DBL_MIN,
     .most = DBL_MAX},
    {.name = "b_std", .kind = PK_OPTION_NUMBER, .attribute = PK__NTK_BIASES, .least = DBL_MIN, .most = DBL_MAX},
    {.name = NULL},
};

static pk_status pk__append_number(pk__parser *parser, const char *name, double number)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    attributes[PK_ACTIVATION_NUMBER] = number;
    return pk__append(parser, name, attributes, 0, NULL);
}

static pk_status pk__append_scale(pk__parser *parser, double factor)
{
    return factor == 1 ? PK_OK : pk__append_number(parser, "scale", factor);
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
    if (status)
        return status;
    if (ntk[PK__NTK_FLAG] == 0)
        return own.count > 1 ? pk__fail(parser->context, PK_FORMAT, "%s: '%.40s' belongs to ntk",
                                        operation->name, own.words[1])
                             : pk__append(parser, operation->name, attributes, 0, NULL);
    /* Biases are scaled with everything behind the layer, so the input is scaled by what is left. */
    const pk_shape *shape = pk__branch_shape(parser);
    const int biased = attributes[dense ? (int)PK_DENSE_BIAS : (int)PK_CONVOLUTION_BIAS] != 0;
    const double after = biased ? ntk[PK__NTK_BIASES] : 1;
    const double taps =
        attributes[PK_CONVOLUTION_KERNEL + 1] *
        (shape->rank == 2 ? 1 : attributes[PK_CONVOLUTION_KERNEL]); /* of a signal, or of an image */
    const double fan_in = dense ? (double)shape->dims[shape->rank - 1]
                                : (double)shape->dims[0] / attributes[PK_CONVOLUTION_GROUPS] * taps;
    attributes[dense ? (int)PK_DENSE_INITIAL : (int)PK_CONVOLUTION_INITIAL] = PK_INITIAL_STANDARD;
    status = pk__append_scale(parser, ntk[PK__NTK_WEIGHTS] / (after * sqrt(fan_in)));
    if (!status)
        status = pk__append(parser, operation->name, attributes, 0, NULL);
    return status ? status : pk__append_scale(parser, after);
}

/* embedding V D [padding=] [first=] [count=] [offset=]: the language counts the padding token from 0. */
static pk_status pk__embedding_layer(pk__parser *parser, const pk__layer *layer)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    attributes[PK_EMBEDDING_PADDING] = -1;
    pk_status status =
        pk__parse_options(parser->context, "embedding", pk__embedding_options, layer, attributes);
    attributes[PK_EMBEDDING_PADDING]++;
    return status ? status : pk__append(parser, "embedding", attributes, 0, NULL);
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
    attributes[PK_AFFINE_FACTOR] = 1;
    return pk__append(parser, "affine", attributes, 0, NULL);
}

/* prelu [N=1]: a x below 0, and x above, with one learned a or one for each channel: y = r + a (x - r), r = relu(x), so that
 * each kink is watched once. */
static pk_status pk__prelu_layer(pk__parser *parser, const pk__layer *layer)
{
    static const pk_option options[] = {
        {.name = "number of slopes",
         .kind = PK_OPTION_NUMBER,
         .position = 1,
         .least = 1,
         .most = 1e9,
         .whole = 1},
        {.name = NULL},
    };
    const pk_shape *shape = pk__branch_shape(parser);
    const int values = parser->node;
    double slopes[PK_NODE_ATTRIBUTES] = {1}, affine[PK_NODE_ATTRIBUTES] = {0};
    pk_status status = pk__parse_options(parser->context, "prelu", options, layer, slopes);
    if (!status)
        status = pk__check_attributes(parser->context, "prelu", options, slopes);
    if (!status && slopes[0] != 1 && slopes[0] != (double)shape->dims[0])
        status = pk__fail(parser->context, PK_SHAPE,
                          "prelu: %g slopes for %zu channels; one slope, or one for each channel, is possible",
                          slopes[0], shape->dims[0]);
    affine[PK_AFFINE_SCALAR] = slopes[0] == 1;
    affine[PK_AFFINE_FACTOR] = 0.25;
    if (!status)
        status = pk__append(parser, "relu", NULL, 0, NULL);
    const int positive = parser->node;
    if (!status)
        status = pk__append_scale(parser, -1);
    if (!status)
        status = pk__append_add(parser, values);
    if (!status)
        status = pk__append(parser, "affine", affine, 0, NULL);
    return status ? status : pk__append_add(parser, positive);
}

/* softmin: softmax of -x. */
static pk_status pk__softmin_layer(pk__parser *parser, const pk__layer *layer)
{
    if (layer->count > 1)
        return pk__refuse_word(parser->context, "softmin", NULL, layer->words[1]);
    pk_status status = pk__append_scale(parser, -1);
    return status ? status : pk__append(parser, "softmax", NULL, 0, NULL);
}

/* layer_norm and rms_norm [epsilon=] [dims=1] [noaffine], batch_norm NAME [epsilon=] [noaffine]. */
enum { PK__NORM_AFFINE = PK_NODE_ATTRIBUTES - 1 };
static const pk_option pk__norm_options[] = {
    {.name = "dims",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_NORM_DIMS,
     .least = 1,
     .most = PK_SHAPE_RANK,
     .whole = 1}, /* not of batch_norm */
    {.name = "epsilon", .kind = PK_OPTION_NUMBER, .attribute = PK_NORM_EPSILON, .most = DBL_MAX},
    {.name = "noaffine", .kind = PK_OPTION_FLAG, .attribute = PK__NORM_AFFINE},
    {.name = NULL},
};

static pk_status pk__norm_layer(pk__parser *parser, const pk__layer *layer)
{
    const int root = strcmp(layer->words[0], "rms_norm") == 0;
    const char *name = root ? "rms_normalize" : "normalize";
    double attributes[PK_NODE_ATTRIBUTES];
    memcpy(attributes, pk_operation_find(name)->defaults, sizeof attributes);
    attributes[PK__NORM_AFFINE] = 1;
    pk_status status = pk__parse_options(parser->context, layer->words[0], pk__norm_options, layer, attributes);
    if (status)
        return status;
    const int affine = attributes[PK__NORM_AFFINE] != 0;
    attributes[PK__NORM_AFFINE] = 0;
    status = pk__append(parser, name, attributes, 0, NULL);
    return status || !affine ? status : pk__append_affine(parser, !root, attributes[PK_NORM_DIMS]);
}

/* group_norm G [epsilon=1e-5] [noaffine], instance_norm [epsilon=1e-5] [noaffine]: of each channel. */
static pk_status pk__group_norm_layer(pk__parser *parser, const pk__layer *layer)
{
    static const pk_option options[] = {
        {"number of groups", PK_OPTION_NUMBER, PK_NORM_GROUPS, 1, 1, 1, 1e9, 1,
         NULL}, /* not of instance_norm */
        {.name = "epsilon", .kind = PK_OPTION_NUMBER, .attribute = PK_NORM_EPSILON, .most = DBL_MAX},
        {.name = "noaffine", .kind = PK_OPTION_FLAG, .attribute = PK__NORM_AFFINE},
        {.name = NULL},
    };
    const pk_shape *shape = pk__branch_shape(parser);
    const int instance = strcmp(layer->words[0], "instance_norm") == 0;
    double attributes[PK_NODE_ATTRIBUTES];
    memcpy(attributes, pk_operation_find("normalize")->defaults, sizeof attributes);
    attributes[PK__NORM_AFFINE] = 1;
    attributes[PK_NORM_GROUPS] = (double)shape->dims[0];
    pk_status status =
        pk__parse_options(parser->context, layer->words[0], options + instance, layer, attributes);
    if (!status)
        status = pk__check_attributes(parser->context, layer->words[0], options + instance, attributes);
    if (!status && instance && shape->rank < 2)
        status = pk__fail(
            parser->context, PK_SHAPE,
            "instance_norm needs channels of several numbers each, such as 3x28x28, not a vector of %zu",
            shape->dims[0]);
    const int affine = attributes[PK__NORM_AFFINE] != 0;
    attributes[PK__NORM_AFFINE] = 0;
    if (!status)
        status = pk__append(parser, "normalize", attributes, 0, NULL);
    return status || !affine ? status : pk__append_affine(parser, 1, 0);
}

/* attention H [causal] [shared] [nobias]: PyTorch's MultiheadAttention with as many outputs as inputs; shared: one
 * projection for queries, keys and values. */
static pk_status pk__attention_layer(pk__parser *parser, const pk__layer *layer)
{
    enum { BIAS = PK_NODE_ATTRIBUTES - 1 };
    static const pk_option options[] = {
        PK__ATTEND_OPTIONS,
        {.name = "nobias", .kind = PK_OPTION_FLAG, .attribute = BIAS},
        {.name = NULL},
    };
    const pk_shape *shape = pk__branch_shape(parser);
    const double width = (double)shape->dims[shape->rank - 1];
    double attributes[PK_NODE_ATTRIBUTES] = {0}, dense[PK_NODE_ATTRIBUTES] = {0};
    attributes[BIAS] = 1;
    char text[PK_SHAPE_TEXT];
    pk_status status = pk__parse_options(parser->context, "attention", options, layer, attributes);
    if (!status)
        status = pk__check_attributes(parser->context, "attention", options, attributes);
    if (status)
        return status;
    if (shape->rank != 2)
        return pk__fail(parser->context, PK_SHAPE, "attention needs values of tokens x width, not of shape %s",
                        pk_shape_text(shape, text));
    if (fmod(width, attributes[PK_ATTEND_HEADS]) != 0)
        return pk__fail(parser->context, PK_SHAPE, "attention: a width of %g cannot be split into %g heads",
                        width, attributes[PK_ATTEND_HEADS]);
    dense[PK_DENSE_OUTPUTS] = (attributes[PK_ATTEND_SHARED] != 0 ? 1 : 3) * width;
    dense[PK_DENSE_BIAS] = attributes[BIAS];
    dense[PK_DENSE_INITIAL] = PK_INITIAL_GLOROT_UNIFORM;
    dense[PK_DENSE_GAIN] = 1;
    attributes[BIAS] = 0;
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
    if (!status)
        status = pk__check_attributes(parser->context, "max_pool", operation->options, attributes);
    if (!status)
        status = pk__pool_options_of(parser->context, "max_pool", pk__branch_shape(parser), attributes);
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

/* adaptive_max_pool of KxK as columns, then rows, likewise. */
static pk_status pk__adaptive_max_layer(pk__parser *parser, const pk__layer *layer)
{
    const pk_operation *operation = pk_operation_find("adaptive_max_pool");
    double attributes[PK_NODE_ATTRIBUTES], part[PK_NODE_ATTRIBUTES];
    pk_status status = pk__plain_layer(parser, layer, operation, attributes);
    const pk_shape input = *pk__branch_shape(parser);
    const double *sizes = attributes + PK_POOL_KERNEL;
    if (!status && input.rank != 3) /* a signal, or refused */
        return pk__append(parser, operation->name, attributes, 0, NULL);
    memcpy(part, attributes, sizeof part);
    part[PK_POOL_KERNEL] = (double)input.dims[1];
    if (!status && sizes[1] != (double)input.dims[2])
        status = pk__append(parser, operation->name, part, 0, NULL);
    return status || sizes[0] == (double)input.dims[1]
               ? status
               : pk__append(parser, operation->name, attributes, 0, NULL);
}

/* The operation of a layer with constants, of the array that it names: `numbers`, or those of the node `like`. */
static pk_status pk__append_constant(pk__parser *parser, const pk__layer *layer, const pk_operation *operation,
                                     const pk_array *array, const pk_real *numbers, const pk_node *like)
{
    const char *name = layer->words[0], *its = layer->words[1];
    const int norm = strcmp(name, "batch_norm") == 0;
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    pk__layer rest = *layer;
    rest.count--;
    for (int i = 1; i < rest.count; i++)
        rest.words[i] = layer->words[i + 1];
    attributes[PK_NORM_EPSILON] = norm ? 1e-5 : 0;
    attributes[PK__NORM_AFFINE] = norm;
    pk_status status =
        pk__parse_options(parser->context, name, norm ? pk__norm_options + 1 : NULL, &rest, attributes);
    if (status)
        return status;
    const int affine = attributes[PK__NORM_AFFINE] != 0;
    attributes[PK__NORM_AFFINE] = 0;
    if (array->rank != 2)
        return pk__fail(parser->context, PK_SHAPE, "%s: the array '%.40s' has rank %d, not 2", name, its,
                        array->rank);
    if (norm && array->shape[0] != 2 &&
        pk_array_items(array) % 2 == 0) /* (channels, 2) holds as many numbers in another order */
        return pk__fail(parser->context, PK_SHAPE,
                        "batch_norm: the array '%.40s' has %zu rows, not one of means and one of variances",
                        its, array->shape[0]);
    if (strcmp(name, "propagate") == 0 && array->shape[1] != 3)
        return pk__fail(parser->context, PK_SHAPE,
                        "propagate: the array '%.40s' has %zu columns, not row, column and value", its,
                        array->shape[1]);
    if (strcmp(name, "constant") == 0)
        parser->node = 0;
    if (strcmp(name, "constant") == 0 || strcmp(name, "gather") == 0) /* both have the shape in front */
        for (int i = 0; i < 2; i++)
            attributes[i] = (double)array->shape[i];
    status = pk__graph_append(parser->context, parser->graph, operation, 1, &parser->node, attributes,
                              pk_array_items(array), like ? like->constants : numbers, like, &parser->node);
    if (status)
        return status;
    pk_node *node = &parser->graph->nodes[parser->node];
    memcpy(node->constant_name, its, strlen(its) + 1);
    node->constant_columns = array->shape[1];
    return affine ? pk__append_affine(parser, 1, 0) : PK_OK;
}

/* constant NAME, propagate NAME, gather NAME, batch_norm NAME. */
static pk_status pk__constant_layer(pk__parser *parser, const pk__layer *layer)
{
    const int norm = strcmp(layer->words[0], "batch_norm") == 0;
    const pk_operation *operation = pk_operation_find(norm ? "standardize" : layer->words[0]);
    pk_array array;
    pk_real *numbers = NULL;
    const pk_node *like = NULL;
    if (norm && (layer->count < 2 || strchr(layer->words[1], '=')))
        return pk__fail(
            parser->context, PK_FORMAT,
            "batch_norm needs the name of an array with its frozen means and variances; in training mode an "
            "example's output would depend on the rest of its batch");
    pk_status status = pk__named_constants(parser, layer, operation->name, &like, &array, &numbers);
    if (!status)
        status = pk__append_constant(parser, layer, operation, &array, numbers, like);
    pk_release(parser->context, numbers);
    pk_array_release(parser->context, &array);
    return status;
}

/* fourier N [scale=1] [seed=0]: N normal frequencies of standard deviation scale for each input. */
enum { PK__FOURIER_COUNT, PK__FOURIER_SCALE, PK__FOURIER_SEED };
enum {
    PK__FOURIER_NUMBERS = 1 << 19
}; /* of a whole network: a text of a few words shall not take seconds to read */
static const pk_option pk__fourier_options[] = {
    {.name = "number of frequencies",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK__FOURIER_COUNT,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = "scale",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK__FOURIER_SCALE,
     .least = DBL_MIN,
     .most = DBL_MAX},
    {.name = "seed", .kind = PK_OPTION_NUMBER, .attribute = PK__FOURIER_SEED, .most = 9e15, .whole = 1},
    {.name = NULL},
};

static pk_status pk__fourier_layer(pk__parser *parser, const pk__layer *layer)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0, 1, 0};
    pk_status status = pk__parse_options(parser->context, "fourier", pk__fourier_options, layer, attributes);
    if (!status)
        status = pk__check_attributes(parser->context, "fourier", pk__fourier_options, attributes);
    if (status)
        return status;
    const pk_node *input = &parser->graph->nodes[parser->node];
    if (input->varies)
        return pk__fail(parser->context, PK_UNSUPPORTED,
                        "Fourier features are taken of data, before the first weights");
    if (attributes[PK__FOURIER_COUNT] * (double)input->width >
        (double)PK__FOURIER_NUMBERS - (double)parser->frequencies)
        return pk__fail(
            parser->context, PK_OVERFLOW,
            "fourier: %g frequencies of %zu inputs are %g numbers, and a network has at most %d; larger "
            "features may be computed beforehand, as the inputs",
            attributes[PK__FOURIER_COUNT], input->width, attributes[PK__FOURIER_COUNT] * (double)input->width,
            PK__FOURIER_NUMBERS);
    const size_t count = (size_t)attributes[PK__FOURIER_COUNT] * input->width;
    pk_real *numbers = NULL;
    parser->frequencies += count;
    status = pk_allocate(parser->context, count, sizeof *numbers, "frequencies", &numbers);
    if (status)
        return status;
    pk_random random = {(uint64_t)attributes[PK__FOURIER_SEED], 0, 0};
    for (size_t i = 0; i < count; i++)
        numbers[i] = (pk_real)(attributes[PK__FOURIER_SCALE] * pk_random_normal(&random));
    status = pk__append(parser, "fourier", NULL, count, numbers);
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

/* ---- values that have names ------------------------------------------------------------------------ */

static pk_status pk__name_nodes(pk__parser *parser, const char *layer, const char *name, size_t first,
                                size_t last);

/* The node of a value that `as` named, or of the network's inputs. */
static pk_status pk__find_value(pk__parser *parser, const char *layer, const char *name, int *node)
{
    *node = 0;
    if (strcmp(name, "input") == 0)
        return PK_OK;
    for (size_t i = 0; i < parser->named_count; i++)
        if (!parser->named[i].last && strcmp(parser->named[i].name, name) == 0) {
            *node = (int)parser->named[i].first;
            return PK_OK;
        }
    return pk__fail(parser->context, PK_FORMAT,
                    "%s: no value before it has the name '%.40s': 'as NAME' names one", layer, name);
}

/* Whether a layer has from least to most words behind its name; what: what they are. */
static pk_status pk__check_words(pk__parser *parser, const pk__layer *layer, int least, int most,
                                 const char *what)
{
    const int count = layer->count - 1;
    for (int i = 1; i < layer->count; i++) {
        pk_status status = pk__check_word(parser->context, layer->words[i]);
        if (status)
            return status;
    }
    if (count < least)
        return pk__fail(parser->context, PK_FORMAT, "%s needs %s", layer->words[0], what);
    if (count > most)
        return pk__fail(parser->context, PK_FORMAT, "%s needs %s, and '%.40s' stands behind that%s",
                        layer->words[0], what, layer->words[most + 1],
                        pk__separator_hint(parser->context, layer->words[most + 1]));
    return PK_OK;
}

/* A word that is a whole number from 0 on. */
static pk_status pk__whole_word(pk__parser *parser, const pk__layer *layer, int word, double *number)
{
    const char *text = layer->words[word];
    if (pk__number(text, strlen(text), number) && *number >= 0 && *number <= 1e15 && *number == floor(*number))
        return PK_OK;
    return pk__fail(parser->context, PK_FORMAT, "%s: '%.40s' is not a whole number", layer->words[0], text);
}

/* as NAME, from NAME. */
static pk_status pk__name_layer_value(pk__parser *parser, const pk__layer *layer)
{
    pk_status status = pk__check_words(parser, layer, 1, 1, "a name");
    if (status)
        return status;
    if (strcmp(layer->words[0], "from") == 0)
        return pk__find_value(parser, layer->words[0], layer->words[1], &parser->node);
    return pk__name_nodes(parser, layer->words[0], layer->words[1], (size_t)parser->node, 0);
}

/* A view of the branch in hand: shape, strides and the first number. */
static pk_status pk__append_view(pk__parser *parser, const pk_shape *shape, const size_t *strides,
                                 size_t offset)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    attributes[PK_VIEW_RANK] = shape->rank;
    for (int i = 0; i < shape->rank; i++) {
        attributes[PK_VIEW_DIMS + i] = (double)shape->dims[i];
        attributes[PK_VIEW_STRIDES + i] = (double)strides[i];
    }
    attributes[PK_VIEW_OFFSET] = (double)offset;
    return pk__append(parser, "view", attributes, 0, NULL);
}

/* strides[i]: from one number to the next along axis i. */
static void pk__shape_strides(const pk_shape *shape, size_t *strides)
{
    size_t stride = 1;
    for (int i = shape->rank - 1; i >= 0; i--) {
        strides[i] = stride;
        stride *= shape->dims[i];
    }
}

/* The branch in hand repeated, as NumPy broadcasts, so that it has the shape. */
static pk_status pk__append_broadcast(pk__parser *parser, const pk_shape *shape)
{
    const pk_shape own = *pk__branch_shape(parser);
    size_t from[PK_SHAPE_RANK], strides[PK_SHAPE_RANK];
    if (own.rank == shape->rank && memcmp(own.dims, shape->dims, (size_t)own.rank * sizeof *own.dims) == 0)
        return PK_OK;
    pk__shape_strides(&own, from);
    for (int i = 0; i < shape->rank; i++) {
        const int axis = i - (shape->rank - own.rank);
        strides[i] = axis >= 0 && own.dims[axis] > 1 ? from[axis] : 0;
    }
    return pk__append_view(parser, shape, strides, 0);
}

/* add NAME, subtract NAME, multiply NAME, divide NAME: axes of one number, and missing ones in front, are repeated. */
static pk_status pk__pair_layer(pk__parser *parser, const pk__layer *layer)
{
    pk_context *context = parser->context;
    int nodes[2] = {parser->node, 0};
    char texts[2][PK_SHAPE_TEXT];
    pk_status status = pk__check_words(parser, layer, 1, 1, "the name of a value");
    if (!status)
        status = pk__find_value(parser, layer->words[0], layer->words[1], &nodes[1]);
    if (status)
        return status;
    const pk_shape a = parser->graph->nodes[nodes[0]].shape, b = parser->graph->nodes[nodes[1]].shape;
    pk_shape shape = a.rank >= b.rank ? a : b;
    for (int i = 1; i <= shape.rank; i++) {
        const size_t m = i <= a.rank ? a.dims[a.rank - i] : 1, n = i <= b.rank ? b.dims[b.rank - i] : 1;
        if (m != n && m != 1 && n != 1)
            return pk__fail(context, PK_SHAPE, "%s: values of %s and of %s ('%.40s') do not fit",
                            layer->words[0], pk_shape_text(&a, texts[0]), pk_shape_text(&b, texts[1]),
                            layer->words[1]);
        shape.dims[shape.rank - i] = m > n ? m : n;
    }
    const int divide = strcmp(layer->words[0], "divide") == 0,
              subtract = strcmp(layer->words[0], "subtract") == 0;
    const char *name = divide || strcmp(layer->words[0], "multiply") == 0 ? "multiply" : "add";
    for (int j = 0; j < 2 && !status; j++) {
        parser->node = nodes[j];
        if (j && (divide || subtract)) /* before it is repeated */
            status = pk__append_number(parser, divide ? "power" : "scale", -1);
        if (!status)
            status = pk__append_broadcast(parser, &shape);
        nodes[j] = parser->node;
    }
    return status ? status
                  : pk__graph_append(context, parser->graph, pk_operation_find(name), 2, nodes, NULL, 0, NULL,
                                     NULL, &parser->node);
}

/* matmul NAME [transpose]: the value in hand times the named one, or its transpose. */
static pk_status pk__matmul_layer(pk__parser *parser, const pk__layer *layer)
{
    int nodes[2] = {parser->node, 0};
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    pk_status status = pk__check_words(parser, layer, 1, 2, "the name of a value, and perhaps 'transpose'");
    if (!status && layer->count > 2 && strcmp(layer->words[2], "transpose") != 0)
        status = pk__fail(parser->context, PK_FORMAT,
                          "'%.40s' is not an option of matmul; possible is 'transpose'", layer->words[2]);
    if (!status)
        status = pk__find_value(parser, "matmul", layer->words[1], &nodes[1]);
    attributes[PK_MATMUL_TRANSPOSED] = layer->count > 2;
    return status ? status
                  : pk__graph_append(parser->context, parser->graph, pk_operation_find("matmul"), 2, nodes,
                                     attributes, 0, NULL, NULL, &parser->node);
}

/* concat AXIS NAME ...: the value in hand, then the named ones. */
static pk_status pk__concat_layer(pk__parser *parser, const pk__layer *layer)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    pk_status status = pk__check_words(parser, layer, 2, PK__LAYER_WORDS, "an axis and the names of values");
    if (!status)
        status = pk__whole_word(parser, layer, 1, &attributes[PK_VALUES_AXIS]);
    for (int i = 2; i < layer->count && !status;) {
        int nodes[PK_NODE_INPUTS] = {parser->node}, count = 1;
        while (!status && count < PK_NODE_INPUTS && i < layer->count)
            status = pk__find_value(parser, "concat", layer->words[i++], &nodes[count++]);
        if (!status)
            status = pk__graph_append(parser->context, parser->graph, pk_operation_find("concatenate"), count,
                                      nodes, attributes, 0, NULL, NULL, &parser->node);
    }
    return status;
}

/* slice AXIS FIRST COUNT, permute AXIS ...: axis i of the result is that axis of the value. */
static pk_status pk__view_layer(pk__parser *parser, const pk__layer *layer)
{
    pk_context *context = parser->context;
    const pk_shape from = *pk__branch_shape(parser);
    const int slice = strcmp(layer->words[0], "slice") == 0, words = slice ? 3 : from.rank;
    pk_shape shape = from;
    size_t own[PK_SHAPE_RANK], strides[PK_SHAPE_RANK], offset = 0;
    double number[PK_SHAPE_RANK] = {0};
    char text[PK_SHAPE_TEXT];
    unsigned seen = 0;
    pk_status status = pk__check_words(parser, layer, words, words,
                                       slice ? "an axis, the first index and how many" : "every axis once");
    for (int i = 0; i < words && !status; i++) {
        status = pk__whole_word(parser, layer, i + 1, &number[i]);
        if (!status && (!slice || i == 0) && number[i] >= from.rank)
            status = pk__fail(context, PK_SHAPE, "%s: values of %s have no axis %g", layer->words[0],
                              pk_shape_text(&from, text), number[i]);
    }
    if (status)
        return status;
    pk__shape_strides(&from, own);
    memcpy(strides, own, sizeof strides);
    for (int i = 0; i < words && !slice; i++) {
        seen |= 1u << (int)number[i];
        shape.dims[i] = from.dims[(int)number[i]];
        strides[i] = own[(int)number[i]];
    }
    if (!slice && seen != (1u << from.rank) - 1)
        return pk__fail(context, PK_SHAPE, "permute: every axis of %s has to come once",
                        pk_shape_text(&from, text));
    if (slice) {
        const int axis = (int)number[0];
        if (number[2] < 1 || number[1] + number[2] > (double)from.dims[axis])
            return pk__fail(context, PK_SHAPE, "slice: %g numbers from %g on, along axis %d of %s", number[2],
                            number[1], axis, pk_shape_text(&from, text));
        shape.dims[axis] = (size_t)number[2];
        offset = (size_t)number[1] * own[axis];
    }
    return pk__append_view(parser, &shape, strides, offset);
}

/* sum AXIS, mean AXIS. */
static pk_status pk__sum_layer(pk__parser *parser, const pk__layer *layer)
{
    const pk_shape from = *pk__branch_shape(parser);
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    pk_status status = pk__check_words(parser, layer, 1, 1, "an axis");
    if (!status)
        status = pk__whole_word(parser, layer, 1, &attributes[PK_VALUES_AXIS]);
    if (!status)
        status = pk__append(parser, "sum", attributes, 0, NULL);
    return status || strcmp(layer->words[0], "sum") == 0
               ? status
               : pk__append_scale(parser, 1 / (double)from.dims[(int)attributes[PK_VALUES_AXIS]]);
}

static pk_status pk__append_reshape(pk__parser *parser, const pk_shape *shape)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    attributes[PK_VALUES_RANK] = shape->rank;
    for (int i = 0; i < shape->rank; i++)
        attributes[PK_VALUES_DIMS + i] = (double)shape->dims[i];
    return pk__append(parser, "reshape", attributes, 0, NULL);
}

/* max AXIS, min AXIS: the axis becomes the last one, the others are channels, and each is one window. */
static pk_status pk__max_layer(pk__parser *parser, const pk__layer *layer)
{
    const pk_shape from = *pk__branch_shape(parser);
    const double sign = strcmp(layer->words[0], "min") == 0 ? -1 : 1;
    pk_shape to = {0, {0}}, moved = {0, {0}}, signal = {2, {1, 1}};
    size_t own[PK_SHAPE_RANK], strides[PK_SHAPE_RANK];
    double axis = 0, one[PK_NODE_ATTRIBUTES];
    char text[PK_SHAPE_TEXT];
    pk_status status = pk__check_words(parser, layer, 1, 1, "an axis");
    if (!status)
        status = pk__whole_word(parser, layer, 1, &axis);
    if (!status && axis >= from.rank)
        status = pk__fail(parser->context, PK_SHAPE, "%s: values of %s have no axis %g", layer->words[0],
                          pk_shape_text(&from, text), axis);
    if (status)
        return status;
    pk__shape_strides(&from, own);
    for (int i = 0; i < from.rank; i++)
        if (i != (int)axis) {
            strides[to.rank] = own[i];
            signal.dims[0] *= from.dims[i];
            to.dims[to.rank++] = from.dims[i];
        }
    moved = to;
    strides[moved.rank] = own[(int)axis];
    moved.dims[moved.rank++] = signal.dims[1] = from.dims[(int)axis];
    if (!to.rank)
        to.dims[to.rank++] = 1;
    memcpy(one, pk_operation_find("adaptive_max_pool")->defaults, sizeof one);
    one[PK_POOL_KERNEL] = one[PK_POOL_KERNEL + 1] = 1;
    status = pk__append_scale(parser, sign);
    if (!status && (int)axis != from.rank - 1)
        status = pk__append_view(parser, &moved, strides, 0);
    if (!status)
        status = pk__append_reshape(parser, &signal);
    if (!status)
        status = pk__append(parser, "adaptive_max_pool", one, 0, NULL);
    if (!status)
        status = pk__append_reshape(parser, &to);
    return status ? status : pk__append_scale(parser, sign);
}

/* reshape SHAPE, parameter SHAPE. */
static pk_status pk__shape_layer(pk__parser *parser, const pk__layer *layer)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    pk_shape shape;
    pk_status status = pk__check_words(parser, layer, 1, 1, "a shape such as 4x8");
    if (!status)
        status = pk__parse_shape(parser->context, layer->words[1], &shape);
    if (status || strcmp(layer->words[0], "reshape") == 0)
        return status ? status : pk__append_reshape(parser, &shape);
    attributes[PK_VALUES_RANK] = shape.rank;
    for (int i = 0; i < shape.rank; i++)
        attributes[PK_VALUES_DIMS + i] = (double)shape.dims[i];
    if (strcmp(layer->words[0], "parameter") == 0)
        parser->node = 0; /* it depends on weights alone */
    return pk__append(parser, layer->words[0], attributes, 0, NULL);
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
    {"dense", pk__weights_layer},
    {"conv", pk__weights_layer},
    {"position", pk__position_layer},
    {"propagate", pk__constant_layer},
    {"constant", pk__constant_layer},
    {"gather", pk__constant_layer},
    {"embedding", pk__embedding_layer},
    {"fourier", pk__fourier_layer},
    {"select", pk__select_layer},
    {"dropout", pk__refused_layer},
    {"layer_norm", pk__norm_layer},
    {"rms_norm", pk__norm_layer},
    {"batch_norm", pk__constant_layer},
    {"attention", pk__attention_layer},
    {"max_pool", pk__max_pool_layer},
    {"as", pk__name_layer_value},
    {"from", pk__name_layer_value},
    {"add", pk__pair_layer},
    {"subtract", pk__pair_layer},
    {"multiply", pk__pair_layer},
    {"divide", pk__pair_layer},
    {"matmul", pk__matmul_layer},
    {"concat", pk__concat_layer},
    {"slice", pk__view_layer},
    {"permute", pk__view_layer},
    {"sum", pk__sum_layer},
    {"mean", pk__sum_layer},
    {"max", pk__max_layer},
    {"min", pk__max_layer},
    {"reshape", pk__shape_layer},
    {"parameter", pk__shape_layer},
    {"prelu", pk__prelu_layer},
    {"softmin", pk__softmin_layer},
    {"group_norm", pk__group_norm_layer},
    {"instance_norm", pk__group_norm_layer},
    {"adaptive_max_pool", pk__adaptive_max_layer},
};

/* Whether a name is a layer's: dropout is refused. */
static int pk__is_layer(const char *name)
{
    return !pk__is_part(name) && strcmp(name, "dropout") != 0;
}

PK_API const char *pk_network_layer(size_t index)
{
    const pk_operation *operation;
    for (size_t i = 0; (operation = pk_operation_at(i)) != NULL; i++)
        if (pk__is_layer(operation->name) && index-- == 0)
            return operation->name;
    for (size_t i = 0; i < sizeof pk__composites / sizeof *pk__composites; i++)
        if (pk__is_layer(pk__composites[i].name) && !pk_operation_find(pk__composites[i].name) && index-- == 0)
            return pk__composites[i].name;
    return index == 0 ? "residual" : NULL;
}

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

static pk_status pk__build_layer(pk__parser *parser, const pk__layer *layer)
{
    for (size_t i = 0; i < sizeof pk__composites / sizeof *pk__composites; i++)
        if (strcmp(layer->words[0], pk__composites[i].name) == 0)
            return pk__composites[i].build(parser, layer);
    const pk_operation *operation = pk__named_operation(parser->context, layer->words[0]);
    double attributes[PK_NODE_ATTRIBUTES];
    if (!operation || pk__is_part(operation->name))
        return pk__unknown_layer(parser, layer->words[0]);
    pk_status status = pk__plain_layer(parser, layer, operation, attributes);
    return status ? status : pk__append(parser, operation->name, attributes, 0, NULL);
}

/* ---- ties ------------------------------------------------------------------------------------------ */

/* name=, tied= and transposed of a layer. */
typedef struct pk__tie_words {
    const char *name, *tied, *transposed; /* NULL: not there */
} pk__tie_words;

static pk_status pk__check_name(pk_context *context, const char *layer, const char *name, size_t length)
{
    if (length && length < PK_CONSTANT_NAME &&
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") >= length)
        return PK_OK;
    return pk__fail(context, PK_FORMAT,
                    "%s: '%.40s' is not the name of a layer: up to %d letters, digits and _", layer, name,
                    PK_CONSTANT_NAME - 1);
}

/* Takes the words of ties out of a layer. */
static pk_status pk__take_tie_words(pk_context *context, const pk__layer *layer, pk__layer *rest,
                                    pk__tie_words *words)
{
    memset(words, 0, sizeof *words);
    *rest = *layer;
    rest->count = 0;
    for (int i = 0; i < layer->count; i++) {
        const char *word = layer->words[i], *value = word;
        const char **to = NULL;
        if (i && strncmp(word, "name=", 5) == 0) {
            to = &words->name;
            value = word + 5;
        } else if (i && strncmp(word, "tied=", 5) == 0) {
            to = &words->tied;
            value = word + 5;
        } else if (i && strcmp(word, "transposed") == 0)
            to = &words->transposed;
        if (!to)
            rest->words[rest->count++] = word;
        else if (*to)
            return pk__fail(context, PK_FORMAT, "%s: '%.40s' comes twice", layer->words[0], word);
        else
            *to = value;
    }
    if (words->transposed && !words->tied)
        return pk__fail(context, PK_FORMAT, "%s: 'transposed' belongs to tied=", layer->words[0]);
    return PK_OK;
}

/* The next node with weights from n on, before last; last where there is none. */
static size_t pk__next_weights(const pk_graph *graph, size_t n, size_t last)
{
    while (n < last && !graph->nodes[n].weight_count)
        n++;
    return n;
}

/* Ties the nodes from first on to those of the layer that `tied` names. */
static pk_status pk__tie_layer(pk__parser *parser, const char *layer, const pk__tie_words *words, size_t first)
{
    pk_graph *graph = parser->graph;
    const size_t length = strcspn(words->tied, "."), last = graph->node_count;
    const char *part = words->tied + length;
    const pk__named_layer *named = NULL;
    int tied = 0;
    pk_status status = pk__check_name(parser->context, layer, words->tied, length);
    if (status)
        return status;
    if (*part && strcmp(part, ".weight") != 0 && strcmp(part, ".bias") != 0)
        return pk__fail(parser->context, PK_FORMAT,
                        "%s: tied=%.40s: behind the name, '.weight' and '.bias' are possible", layer,
                        words->tied);
    for (size_t i = 0; i < parser->named_count; i++)
        if (parser->named[i].last && strncmp(parser->named[i].name, words->tied, length) == 0 &&
            !parser->named[i].name[length])
            named = &parser->named[i];
    if (!named)
        return pk__fail(parser->context, PK_FORMAT, "%s: tied=%.40s: no layer before it says name=%.*s", layer,
                        words->tied, (int)length, words->tied);
    size_t n = pk__next_weights(graph, first, last), o = pk__next_weights(graph, named->first, named->last);
    for (; n < last && o < named->last;
         n = pk__next_weights(graph, n + 1, last), o = pk__next_weights(graph, o + 1, named->last))
        for (int tensor = 0; tensor < PK_NODE_TENSORS; tensor++) {
            const int wanted = *part && (strcmp(part, ".bias") == 0) == tensor;
            if (*part ? !wanted
                      : tensor >= graph->nodes[n].tensor_count || tensor >= graph->nodes[o].tensor_count)
                continue;
            char name[PK__LAYER_TEXT];
            snprintf(name, sizeof name, "%.60s tied=%.60s", layer, words->tied);
            status = pk__tie(parser->context, graph, (int)n, tensor, (int)o,
                             words->transposed != NULL && (!tensor || *part), name);
            if (status)
                return status;
            tied++;
        }
    if (n < last || o < named->last || !tied)
        return pk__fail(parser->context, PK_SHAPE,
                        "%s: tied=%.40s: the two layers do not have the same weights", layer, words->tied);
    return PK_OK;
}

/* Remembers a layer that names itself, or, with last == 0, a value. */
static pk_status pk__name_nodes(pk__parser *parser, const char *layer, const char *name, size_t first,
                                size_t last)
{
    pk_status status = pk__check_name(parser->context, layer, name, strlen(name));
    if (!status && strcmp(name, "input") == 0)
        status = pk__fail(parser->context, PK_FORMAT, "%s: 'input' is the name of the network's inputs", layer);
    for (size_t i = 0; !status && i < parser->named_count; i++)
        if (strcmp(parser->named[i].name, name) == 0)
            status = pk__fail(parser->context, PK_FORMAT, "%s: a layer before it has the name '%.40s' already",
                              layer, name);
    if (!status && parser->named_count == parser->named_capacity) {
        pk__named_layer *named = NULL;
        const size_t capacity = parser->named_capacity ? 2 * parser->named_capacity : 8;
        status = pk_allocate(parser->context, capacity, sizeof *named, "the names of layers", &named);
        if (!status) {
            if (parser->named_count)
                memcpy(named, parser->named, parser->named_count * sizeof *named);
            pk_release(parser->context, parser->named);
            parser->named = named;
            parser->named_capacity = capacity;
        }
    }
    if (status)
        return status;
    pk__named_layer *to = &parser->named[parser->named_count++];
    memcpy(to->name, name, strlen(name) + 1);
    to->first = first;
    to->last = last;
    return PK_OK;
}

static pk_status pk__add_layer(pk__parser *parser, const pk__layer *layer)
{
    const size_t first = parser->graph->node_count;
    pk__layer rest;
    pk__tie_words words;
    if (!first)
        return pk__input_layer(parser, layer);
    pk_status status = pk__take_tie_words(parser->context, layer, &rest, &words);
    if (!status)
        status = pk__build_layer(parser, &rest);
    if (status || (!words.name && !words.tied))
        return status;
    if (pk__next_weights(parser->graph, first, parser->graph->node_count) == parser->graph->node_count)
        return pk__fail(parser->context, PK_FORMAT,
                        "%s: it has no weights that could be shared, so '%s' says "
                        "nothing",
                        rest.words[0], words.tied ? "tied=" : "name=");
    if (words.tied)
        status = pk__tie_layer(parser, rest.words[0], &words, first);
    return status || !words.name
               ? status
               : pk__name_nodes(parser, rest.words[0], words.name, first, parser->graph->node_count);
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

/* One layer, and what stands behind it. */
static pk_status pk__parse_layer(pk__parser *parser)
{
    if (parser->number > PK__NETWORK_LAYERS)
        return pk__fail(parser->context, PK_FORMAT, "more than %d layers", PK__NETWORK_LAYERS);
    pk_status status = pk__split_layer(parser, &parser->layer);
    if (status)
        return status;
    status = *parser->at == '(' ? pk__parse_residual(parser) : pk__add_layer(parser, &parser->layer);
    if (status)
        return status;
    if (parser->full)
        return pk__fail(parser->context, PK_FORMAT,
                        "the network's text is longer than the %d characters that a run directory records",
                        PK__NETWORK_TEXT);
    if (parser->depth > 0 || !*parser->at || *parser->at == ';')
        return PK_OK;
    return pk__fail(parser->context, PK_FORMAT,
                    *parser->at == ')'   ? "')' outside of a residual: there is no '(' for it"
                    : *parser->at == '(' ? "'(' behind the ')' of a residual; a ';' is missing"
                                         : "'|' outside of a residual, whose two branches it separates; layers "
                                           "are separated by ';'");
}

/* Layers up to what is no ';'. Of a failure, the number of the innermost layer is kept. */
static pk_status pk__parse_layers(pk__parser *parser)
{
    for (;;) {
        const int number = ++parser->number;
        pk_status status = pk__parse_layer(parser);
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
        else
            pk__graph_list(graph);
        pk_release(context, parser.named);
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
        return pk__fail(context, PK_ARGUMENT, "initialization needs a network and room for its weights");
    pk_real *flat = weights;
    if (graph->tied) {
        pk_status status = pk_allocate(context, graph->untied, sizeof *weights, "initial weights", &weights);
        if (status)
            return status;
    }
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
    if (!graph->tied)
        return PK_OK;
    for (size_t b = 0; b < graph->block_count; b++) { /* its first use initializes a block */
        const pk_weight_block *block = &graph->blocks[b];
        const pk_node *node = &graph->nodes[block->uses[0].node];
        memcpy(flat + block->first, weights + node->weight_offset + node->tensors[block->uses[0].tensor].first,
               block->count * sizeof *flat);
    }
    pk_release(context, weights);
    return PK_OK;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
