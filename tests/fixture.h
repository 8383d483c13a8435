/* fixture.h: what the tests of the numerical core share: run directories made from brute-force runs, the
 * comparison of a decomposition with the truth, an allocator that counts and fails. */
#ifndef FIXTURE_H
#define FIXTURE_H
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mkdtemp */
#endif
#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif
#include "pathkernel_under_test.h"
#define BF_STORED pk_real
#include "brute_force.h"

#define FIXTURE static inline

/* Fails with the library's message. */
#define assert_ok(context, status)                                                   \
    do {                                                                             \
        pk_status fixture_status = (status);                                         \
        if (fixture_status)                                                          \
            fail_msg("%s: %s", pk_status_text(fixture_status), pk_message(context)); \
    } while (0)

/* Fails unless the status is the expected one and the message contains the words. */
#define assert_refused(context, expected, words, status)                                   \
    do {                                                                                   \
        pk_status fixture_status = (status);                                               \
        if (fixture_status != (expected) || !strstr(pk_message(context), words))           \
            fail_msg("expected %s with '%s', got %s: %s", pk_status_text(expected), words, \
                     pk_status_text(fixture_status), pk_message(context));                 \
    } while (0)

/* |a - b| <= tolerance; false for NaN. */
#define assert_close(a, b, tolerance)                                                                \
    do {                                                                                             \
        double fixture_a = (double)(a), fixture_b = (double)(b);                                     \
        if (!(fabs(fixture_a - fixture_b) <= (tolerance)))                                           \
            fail_msg("%.17g and %.17g are %.3g apart", fixture_a, fixture_b, fixture_a - fixture_b); \
    } while (0)

FIXTURE void *fixture_take(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory)
        abort();
    return memory;
}
#define FIXTURE_NEW(type, count) ((type *)fixture_take((size_t)(count), sizeof(type)))

/* ---- runs ------------------------------------------------------------------------------------------- */

/* The network of a line such as "input 3; dense 4 nobias; tanh; dense 2", for the oracle. */
FIXTURE bf_network fixture_network(const char *text)
{
    bf_network network;
    memset(&network, 0, sizeof network);
    for (const char *at = text; at; at = strchr(at, ';') ? strchr(at, ';') + 1 : NULL) {
        char word[32] = "", second[32] = "", layer[80] = "";
        const char *end = strchr(at, ';');
        size_t length = end ? (size_t)(end - at) : strlen(at);
        assert_true(length < sizeof layer);
        memcpy(layer, at, length);
        assert_true(sscanf(layer, " %31s %31s", word, second) >= 1);
        if (strcmp(word, "input") == 0) {
            network.inputs = (size_t)atoi(second);
            continue;
        }
        if (strcmp(word, "dense") == 0) {
            assert_true(network.layers < BF_LAYERS);
            bf_layer *dense = &network.layer[network.layers++];
            dense->width = (size_t)atoi(second);
            dense->no_bias = strstr(layer, "nobias") != NULL;
            dense->activation = BF_IDENTITY;
            continue;
        }
        int found = 0;
        while (found < BF_ACTIVATIONS && strcmp(word, bf_activation_name(found)) != 0)
            found++;
        if (found == BF_GELU && strcmp(second, "tanh") == 0)
            found = BF_GELU_TANH;
        assert_true(found < BF_ACTIVATIONS && network.layers > 0);
        bf_layer *last = &network.layer[network.layers - 1];
        last->activation = (bf_activation)found;
        if (bf_has_parameter(last->activation))
            last->parameter = *second ? atof(second) : found == BF_LEAKY_RELU ? 0.01 : 1;
    }
    return network;
}

/* A rule in brute force's words. */
FIXTURE bf_optimizer fixture_optimizer_of(const pk_optimizer *from)
{
    static const bf_rule rules[] = {
        [PK_SGD] = BF_SGD,         [PK_ADAM] = BF_ADAM,       [PK_ADAMW] = BF_ADAMW,
        [PK_RMSPROP] = BF_RMSPROP, [PK_ADAGRAD] = BF_ADAGRAD, [PK_NADAM] = BF_NADAM};
    bf_optimizer optimizer;
    memset(&optimizer, 0, sizeof optimizer);
    optimizer.rule = rules[from->kind];
    optimizer.momentum = from->momentum;
    optimizer.dampening = from->dampening;
    optimizer.weight_decay = from->weight_decay;
    optimizer.nesterov = from->nesterov;
    optimizer.beta1 = from->beta1;
    optimizer.beta2 = from->beta2;
    optimizer.epsilon = from->epsilon;
    optimizer.alpha = from->alpha;
    optimizer.lr_decay = from->lr_decay;
    optimizer.initial_accumulator_value = from->initial_accumulator_value;
    optimizer.momentum_decay = from->momentum_decay;
    optimizer.decoupled = from->decoupled_weight_decay;
    optimizer.maximize = from->maximize;
    return optimizer;
}

FIXTURE bf_optimizer fixture_optimizer(const char *text)
{
    pk_context context;
    pk_optimizer parsed;
    memset(&context, 0, sizeof context);
    assert_ok(&context, pk_optimizer_parse(&context, text, &parsed));
    return fixture_optimizer_of(&parsed);
}

FIXTURE void fixture_clear(const char *directory)
{
    DIR *entries = opendir(directory);
    if (!entries)
        return;
    for (struct dirent *entry; (entry = readdir(entries)) != NULL;) {
        char path[900];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        (void)remove(path);
    }
    closedir(entries);
    (void)rmdir(directory);
}

/* A fresh folder for a program's runs, for cmocka's group; they are recorded in fixture_run_path. */
static char fixture_folder[200], fixture_run_path[210];

FIXTURE int fixture_enter(void **state)
{
    const char *temporary = getenv("TMPDIR");
    (void)state;
    snprintf(fixture_folder, sizeof fixture_folder, "%.150s/pathkernel-test-XXXXXX",
             temporary ? temporary : "/tmp");
    if (!mkdtemp(fixture_folder))
        return -1;
    snprintf(fixture_run_path, sizeof fixture_run_path, "%s/run", fixture_folder);
    return 0;
}

FIXTURE int fixture_leave(void **state)
{
    (void)state;
    fixture_clear(fixture_run_path);
    fixture_clear(fixture_folder);
    return 0;
}

/* Records a brute-force run under other words for its network and optimiser where they are not NULL, and
 * opens it. The directory is gone when this returns: the run stays mapped. */
FIXTURE void fixture_open_as(pk_context *context, const bf_run *from, const char *network,
                             const char *optimizer, pk_run *run)
{
    const char *temporary = getenv("TMPDIR");
    char directory[300], network_text[512], optimizer_text[256];
    pk_recorder_options options;
    pk_recorder recorder;
    pk_dataset train;
    memset(&options, 0, sizeof options);
    memset(&recorder, 0, sizeof recorder);
    memset(run, 0, sizeof *run);
    snprintf(directory, sizeof directory, "%.200s/pathkernel-test-XXXXXX", temporary ? temporary : "/tmp");
    assert_non_null(mkdtemp(directory));
    bf_network_text(&from->network, network_text, sizeof network_text);
    bf_optimizer_text(&from->optimizer, optimizer_text, sizeof optimizer_text);
    options.network = network ? network : network_text;
    options.loss = bf_loss_name(from->loss);
    options.optimizer = optimizer ? optimizer : optimizer_text;
    options.batch_weights = from->batch_weights != NULL;
    options.gradient_scales = from->gradient_scales != NULL;
    options.second_moments = from->second_moments != NULL;
    const size_t inputs[2] = {from->examples, from->network.inputs},
                 targets[2] = {from->examples, from->outputs};
    train.inputs = pk_array_view(REAL_TYPE, 2, inputs, from->inputs);
    train.targets = from->labels ? pk_array_view(PK_INT64, 1, targets, from->labels)
                                 : pk_array_view(REAL_TYPE, 2, targets, from->targets);
    assert_ok(context, pk_recorder_open(context, directory, &options, &train, from->weights, &recorder));
    for (size_t s = 0; s < from->steps; s++) {
        const int64_t first = from->batch_offsets[s];
        pk_batch batch = {(size_t)(from->batch_offsets[s + 1] - first), from->batch_items + first,
                          from->batch_weights ? from->batch_weights + first : NULL};
        assert_ok(context,
                  pk_recorder_step(context, &recorder, from->learning_rates[s], &batch,
                                   from->gradient_scales ? from->gradient_scales[s] : 1,
                                   from->second_moments ? from->second_moments + s * from->parameters : NULL,
                                   from->weights + (s + 1) * from->parameters));
    }
    assert_ok(context, pk_recorder_close(context, &recorder));
    assert_ok(context, pk_run_open(context, directory, run));
    fixture_clear(directory);
}

FIXTURE void fixture_open(pk_context *context, const bf_run *from, pk_run *run)
{
    fixture_open_as(context, from, NULL, NULL, run);
}

FIXTURE bf_recipe fixture_recipe(uint64_t seed, size_t examples, size_t steps, size_t batch, double rate)
{
    bf_recipe recipe;
    memset(&recipe, 0, sizeof recipe);
    recipe.seed = seed;
    recipe.examples = examples;
    recipe.steps = steps;
    recipe.batch = batch;
    recipe.learning_rate = rate;
    return recipe;
}

/* A run from texts. */
FIXTURE void fixture_make(const char *network, bf_loss loss, const char *optimizer, const bf_recipe *recipe,
                          bf_run *run)
{
    const bf_network net = fixture_network(network);
    const bf_optimizer rule = fixture_optimizer(optimizer);
    bf_run_make(&net, loss, &rule, recipe, run);
}

FIXTURE pk_real *fixture_normals(uint64_t seed, size_t count, double scale)
{
    pk_real *values = FIXTURE_NEW(pk_real, count);
    for (size_t i = 0; i < count; i++)
        values[i] = (pk_real)(scale * bf_normal(&seed));
    return values;
}

/* ---- results ---------------------------------------------------------------------------------------- */

/* Of doubles, such as results, or of pk_reals. */
#define FIXTURE_LARGEST(name, type)                       \
    FIXTURE double name(size_t count, const type *values) \
    {                                                     \
        double largest = 0;                               \
        for (size_t i = 0; i < count; i++)                \
            if (!(fabs((double)values[i]) <= largest))    \
                largest = fabs((double)values[i]);        \
        return largest;                                   \
    }
FIXTURE_LARGEST(fixture_largest_double, double)
FIXTURE_LARGEST(fixture_largest_float, float)
FIXTURE_LARGEST(fixture_largest_real, bf_real)
#define fixture_largest(count, values) \
    _Generic(*(values), double : fixture_largest_double, float : fixture_largest_float)(count, values)

/* The largest |a - b|; NaN is infinite. */
FIXTURE double fixture_apart(size_t count, const double *a, const double *b)
{
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        double error = fabs(a[i] - b[i]);
        worst = error <= worst ? worst : isnan(error) ? (double)INFINITY : error;
    }
    return worst;
}

FIXTURE double fixture_error(size_t count, const double *values, const bf_real *truth)
{
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        double error = fabs((double)((bf_real)values[i] - truth[i]));
        worst = error <= worst ? worst : isnan(error) ? (double)INFINITY : error;
    }
    return worst;
}

/* The worst error of an entry of any kind over the largest by_example entry; all three kinds must be kept. */
FIXTURE double fixture_entry_error(const pk_decomposition *got, const bf_result *truth)
{
    const size_t cells = truth->rows * truth->outputs;
    const double scale = fixture_largest_real(cells * truth->examples, truth->by_example);
    double worst = fixture_error(cells * truth->examples, got->by_example, truth->by_example);
    worst = fmax(worst, fixture_error(cells * truth->steps, got->by_step, truth->by_step));
    worst = fmax(worst, fixture_error(cells * truth->layers, got->by_layer, truth->by_layer));
    worst = fmax(worst, fixture_error(cells, got->decay, truth->decay));
    worst = fmax(worst, fixture_error(cells, got->unattributed, truth->unattributed));
    worst = fmax(worst, fixture_error(cells, got->initial, truth->initial));
    worst = fmax(worst, fixture_error(cells, got->final, truth->final_output));
    return scale > 0 ? worst / scale : worst;
}

FIXTURE uint64_t fixture_hash(uint64_t hash, size_t count, const double *values)
{
    for (size_t i = 0; values && i < count; i++) {
        uint64_t bits;
        memcpy(&bits, values + i, sizeof bits);
        hash = (hash ^ bits) * 0x100000001b3u;
        hash ^= hash >> 29;
    }
    return hash;
}

FIXTURE uint64_t fixture_hash_reals(uint64_t hash, size_t count, const pk_real *values)
{
    for (size_t i = 0; i < count; i++) {
        const double value = (double)values[i];
        hash = fixture_hash(hash, 1, &value);
    }
    return hash;
}

/* Of every number of a decomposition; parts in order give the hash of the whole. */
FIXTURE void fixture_hash_rows(const pk_decomposition *d, uint64_t *hash /* by row */)
{
    for (size_t r = 0; r < d->rows; r++) {
        uint64_t *h = &hash[d->first_row + r];
        const size_t cell = r * d->outputs;
        *h = fixture_hash(1, d->outputs, d->initial + cell);
        *h = fixture_hash(*h, d->outputs, d->final + cell);
        *h = fixture_hash(*h, d->outputs, d->data + cell);
        *h = fixture_hash(*h, d->outputs, d->decay + cell);
        *h = fixture_hash(*h, d->outputs, d->unattributed + cell);
        *h = fixture_hash(*h, d->outputs, d->closure + cell);
        for (size_t k = 0; k < d->kept_count; k++)
            *h = fixture_hash(*h, d->kept[k].row_items, d->kept[k].data + r * d->kept[k].row_items);
        if (d->bounds)
            *h = fixture_hash(*h, d->outputs * d->examples, d->bounds + cell * d->examples);
        if (d->step_closure)
            *h = fixture_hash(*h, d->outputs * d->steps, d->step_closure + cell * d->steps);
    }
}

/* ---- memory ----------------------------------------------------------------------------------------- */

/* An allocator that counts, and fails at allocation number fail_at (from 1; 0: never). */
typedef struct fixture_memory {
    size_t allocations, held, fail_at;
} fixture_memory;

enum { FIXTURE_GUARD = 256 }; /* bytes behind each block that nobody may write */

FIXTURE void *fixture_allocate(void *user, size_t bytes, size_t alignment)
{
    fixture_memory *memory = (fixture_memory *)user;
    void *block = NULL;
    if (++memory->allocations == memory->fail_at ||
        posix_memalign(&block, alignment, bytes + FIXTURE_GUARD) != 0)
        return NULL;
    memset(block, 0xff, bytes); /* NaN: nobody may count on zeros from here */
    memset((unsigned char *)block + bytes, 0xa5, FIXTURE_GUARD);
    memory->held += bytes;
    return block;
}

FIXTURE void fixture_release(void *user, void *pointer, size_t bytes)
{
    ((fixture_memory *)user)->held -= bytes;
    for (size_t i = 0; i < FIXTURE_GUARD; i++)
        if (((unsigned char *)pointer)[bytes + i] != 0xa5)
            fail_msg("byte %zu behind a block of %zu bytes was written", i, bytes);
    free(pointer);
}

FIXTURE void fixture_use(pk_context *context, fixture_memory *memory)
{
    memset(memory, 0, sizeof *memory);
    context->allocator.allocate = fixture_allocate;
    context->allocator.release = fixture_release;
    context->allocator.user = memory;
}

/* Networks with named values, and the size of their vocabulary where the inputs are tokens. `between` is the activation of
 * one of them: smooth for tests that differentiate twice. */
#define NETWORKS_OF_VALUES(between)                                                                           \
    {"input 4; as x; dense 5; silu; as gate; from x; dense 5; multiply gate; dense 3", 0},                    \
        {"input 4; dense 5; as a; " between "; multiply a; as b; dense 5; subtract a; add b; tanh; dense 3",  \
         0},                                                                                                  \
        {"input 3x4; dense 12; as qkv; slice 1 0 4; reshape 3x2x2; permute 1 0 2; as q; from qkv; slice 1 4 " \
         "4; "                                                                                                \
         "reshape 3x2x2; permute 1 0 2; as k; from qkv; slice 1 8 4; reshape 3x2x2; permute 1 0 2; as v; "    \
         "from q; "                                                                                           \
         "matmul k transpose; scale 0.7; softmax; matmul v; permute 1 0 2; reshape 3x4; dense 4; mean 0; "    \
         "dense 3",                                                                                           \
         0},                                                                                                  \
        {"input 3; embedding 5 4; as x; parameter 4x6; as w; from x; matmul w; sum 0; gelu; parameter 6; as " \
         "g; "                                                                                                \
         "dense 6; multiply g; dense 3",                                                                      \
         5},                                                                                                  \
    {                                                                                                         \
        "input 2x3; as x; dense 4; tanh; concat 1 x x input; parameter 3; as s; dense 3; subtract s; "        \
        "flatten; dense 3",                                                                                   \
            0                                                                                                 \
    }

#endif
