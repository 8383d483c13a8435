/* pathkernel/run/run.h: the run directory: a training run as plain NumPy arrays and one text file,
 * written while training, read back mapped.
 *
 *     run.txt              the manifest: network, loss, optimizer
 *     weights.npy          (S+1, P) float32 or float64: w_0 .. w_S
 *     learning_rates.npy   (S,)     float64
 *     batch_offsets.npy    (S+1,)   integers: step s used batch_items[batch_offsets[s] : batch_offsets[s+1]]
 *     batch_items.npy      (T,)     integers: rows of train_inputs.npy; a row may repeat
 *     batch_weights.npy    (T,)     float64, optional: weight of each item's loss; 1/|B_s|, a mean, without it; 1 for a sum;
 *                          1 / the sum of the weights of the step's labels for PyTorch's mean with class weights or
 *                          ignore_index, see loss.h
 *     train_inputs.npy     (N, D...) floats, integers or bools, the axes in the network's order (pk_array_check_rows)
 *     train_targets.npy    (N,) integer labels, (N, C) or (N,) numbers
 *     gradient_scales.npy  (S,)     float64, optional: what gradient clipping multiplied by; 1 without it
 *     momenta.npy          (S,)     float64, optional, where a schedule moves it: the momentum, or beta1 of adam and adamw, of each
 *                          step, of all groups alike
 *     loss_gradients.npy   (T, C)   float32 or float64, with the loss `recorded`: dl/df of each item, whatever the loss was; the
 *                          targets are for the reader alone then
 *     group_rates.npy      (S, G)   float64, optional: the rates of the groups, one column a `group` line
 *     second_moments.npy   (S, P)   float32 or float64, optional: what the optimizer divided by the root of: v of adam, adamw and
 *                          nadam after each step (the largest so far with amsgrad), the sum of adagrad, v of rmsprop
 *     initial_state.npy    (V, P)   float64 or float32, where run.txt has `initial_step K`: the optimizer's vectors before step
 *                          0 (optimizer.h), of a run that goes on from K updates of an optimizer; a tensor whose rule has fewer
 *                          vectors than others does not read the last ones
 *     resume_state.npy     (2, 2 + V P) float64, optional: in each row a step s, a hash of the bits of w_s and of the
 *                          optimizer's V vectors before it, and these; rewritten in turn while a run is recorded, for
 *                          nothing but resuming it
 *
 * A run of our own training may keep every k-th step only (`keep_every k` in run.txt); revisit.h repeats the
 * steps between bit for bit. Then weights.npy has the rows of steps 0, k, 2k, ..., and there are
 *     optimizer_states.npy (S/k + 1, V P) float64: the optimizer's V vectors before steps 0, k, 2k, ...;
 *                          not there where V = 0
 *     checksums.npy        (S+1,)   int64: a hash of the bits of w_s at every step; at kept steps, of the
 *                          optimizer's vectors as well
 *
 * How a run survives a kill at any moment: each step appends one row to every file with one write(2) each,
 * weights.npy last; the sizes of the files, not the counts in their headers, say how many rows there are. So the
 * other files may hold the row of one step more, or a part of it, than weights.npy (checksums.npy, where the
 * weights are not kept): a reader takes the steps that are complete. Files that differ otherwise were not left by a
 * kill: a file is wrong (one rate for all steps), or a power cut lost what the disk had not written yet. Such a run is
 * refused, and opened up to its shortest file only by pk_run_recover. run.txt is put in place last of all when a
 * run starts, so a directory with a manifest is a run.
 */
#ifndef PATHKERNEL_RUN_H
#define PATHKERNEL_RUN_H
#include "../network/language.h"
#include "../training/gradient.h"
#include "../training/groups.h"

/* >>> declarations */
PK__BEGIN_C

enum { PK_KEEP_EVERY_MOST = 1000000000 };

/* A recorded run, mapped read-only. `steps` counts the complete steps. Read weights with pk_replay_weights
 * (revisit.h; of kept steps also with pk_run_weights) and batches with pk_run_batch: they hide how the steps
 * are stored. */
typedef struct pk_run {
    pk_graph graph;
    pk_loss loss;
    pk_criterion criterion; /* the loss with its options */
    pk_optimizer optimizer;
    pk_parameter_groups groups;                  /* weight blocks with options of their own; zeroed: none */
    size_t steps, parameters, examples, outputs; /* S, P, N, C */
    size_t keep_every;                           /* k: weights of steps 0, k, 2k, ... are there; 1: of all */
    /* 1: the files hold more than the complete steps (recording was cut off inside a step, or pk_run_recover was
     * needed); after pk_run_open, pk_message then tells which file ends first. */
    int cut_off;
    pk_dataset train;
    pk_array weights;              /* (at least steps / k + 1, P) */
    pk_array optimizer_states;     /* (at least steps / k + 1, V P); data is NULL where absent */
    pk_array second_moments;       /* (at least steps, P); data is NULL where absent */
    pk_array initial_state;        /* (V, P); data is NULL where the optimizer begins without a state */
    const double *learning_rates;  /* steps */
    const int64_t *batch_offsets;  /* steps + 1 */
    const int64_t *batch_items;    /* batch_offsets[steps] */
    const double *batch_weights;   /* batch_offsets[steps]; NULL: 1/|B_s| */
    const double *gradient_scales; /* steps; NULL: 1 */
    const double *group_rates;     /* steps x groups.count; NULL: their factors times learning_rates */
    const int64_t *checksums;      /* steps + 1; NULL where k = 1 */
    pk_array momenta;              /* (at least steps); data is NULL where absent */
    pk_array loss_gradients;       /* (batch_offsets[steps], C) of the loss `recorded`; data is NULL where absent */
    pk_array columns[7];           /* private: the arrays behind the seven pointers above */
} pk_run;

/* Opens a run and checks everything that can be checked without reading the P-vectors: the manifest, every
 * type and shape against the network, finite training data, targets that fit the loss, offsets that grow,
 * items in [0, N), finite rates, weights and scales. Weights, moments and states are read row by row, and an error where
 * a file has become shorter; the other arrays stay mapped: to truncate them meanwhile is SIGBUS.
 * Cost: reads the training data, the batches and the rates once. Holds a few hundred bytes and the graph.
 * PK_IO, PK_FORMAT, PK_SHAPE, PK_ARGUMENT, PK_UNSUPPORTED, PK_NOT_FINITE, PK_MEMORY, PK_MEMORY_LIMIT; the
 * message names the file and what is wrong ("run.txt line 3: ..."). *run is untouched then. PK_SHAPE where the
 * files differ in their number of steps by more than a kill leaves, with the two counts. PK_MEMORY_LIMIT names the
 * least that would do. */
PK_API PK__MUST_USE pk_status pk_run_open(pk_context *context, const char *directory, pk_run *run);

/* The same, but a run whose files have different numbers of steps, as after a power cut, is opened up to the end of the
 * shortest one. run->cut_off is 1 then, and the message tells which file ends first. */
PK_API PK__MUST_USE pk_status pk_run_recover(pk_context *context, const char *directory, pk_run *run);

/* Shortens an open run to its first `steps` steps: a decomposition is then that of f(w_steps, x), with the same bits as for
 * a run that was recorded for so many steps. Any number from 0 to run->steps is allowed, whatever keep_every is.
 * PK_ARGUMENT where the run is shorter. */
PK_API PK__MUST_USE pk_status pk_run_until(pk_context *context, pk_run *run, size_t steps);

/* Whether the rows of inputs are what the network of a run takes, by pk_array_check_rows; where the network takes plain
 * vectors, the rows of train_inputs.npy tell the order of the axes. name stands before the message. PK_SHAPE. */
PK_API PK__MUST_USE pk_status pk_run_check_inputs(pk_context *context, const pk_run *run,
                                                  const pk_array *inputs, const char *name);

/* The arrays of an open run one by one, as they are held: mapped, or as a file that is open. *name: the array's file. NULL
 * behind the last one; one that the run does not have is zeroed. */
PK_API const pk_array *pk_run_array(const pk_run *run, size_t index, const char **name);

/* Gives everything back; *run is zeroed. A zeroed run is allowed. */
PK_API void pk_run_release(pk_context *context, pk_run *run);

/* The batch of step `step` < run->steps, as a view of the run: never allocates. weights == NULL there
 * means 1/count. */
PK_API void pk_run_batch(const pk_run *run, size_t step, pk_batch *batch);

/* The factor that clipping applied at a step: 1 where none was recorded. */
PK_API double pk_run_gradient_scale(const pk_run *run, size_t step);

/* The rates of the groups at a step, one for each group; NULL if the groups have factors instead. */
PK_API const double *pk_run_group_rates(const pk_run *run, size_t step);

/* The array of the derivatives of the losses that were recorded, and the row of the step's first item; NULL where the loss of
 * the run gives them. */
PK_API const pk_array *pk_run_loss_gradients(const pk_run *run, size_t step, size_t *row);

/* weights (P) := w_step, step in [0, run->steps] and a multiple of run->keep_every, converted exactly (float32
 * to double). Reads one row. PK_NOT_FINITE names the step and the parameter; PK_ARGUMENT for a step that is not
 * there. May be called from several threads with distinct contexts. weights is undefined after PK_NOT_FINITE. */
PK_API PK__MUST_USE pk_status pk_run_weights(pk_context *context, const pk_run *run, size_t step,
                                             pk_real *weights);

/* moments (P) := the row of second_moments.npy of step `step` < run->steps; like pk_run_weights.
 * PK_ARGUMENT where the run has no second_moments.npy, PK_FORMAT where one of them is negative. */
PK_API PK__MUST_USE pk_status pk_run_second_moments(pk_context *context, const pk_run *run, size_t step,
                                                    pk_real *moments);

/* state (V P, V of pk_parameter_groups_state_vectors) := the optimizer's vectors before step 0: those of initial_state.npy, or
 * zeros. PK_ARGUMENT, and what reading gives. */
PK_API PK__MUST_USE pk_status pk_run_initial_state(pk_context *context, const pk_run *run, pk_real *state);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_RUN_IMPLEMENTED)
#define PATHKERNEL_RUN_IMPLEMENTED
/* >>> implementation */
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
PK__BEGIN_COLD_CODE

/* The files that grow, in the order in which a step writes them: weights.npy commits the step; checksums.npy
 * does where the weights are not kept. */
enum {
    PK__RUN_RATES,
    PK__RUN_OFFSETS,
    PK__RUN_ITEMS,
    PK__RUN_ITEM_WEIGHTS,
    PK__RUN_SCALES,
    PK__RUN_GROUP_RATES,
    PK__RUN_CHECKSUMS,
    PK__RUN_LOSS_GRADIENTS,
    PK__RUN_MOMENTA,
    PK__RUN_MOMENTS,
    PK__RUN_STATES,
    PK__RUN_WEIGHTS,
    PK__RUN_FILES
};

typedef struct pk__run_file {
    const char *name;
    pk_type type; /* 0: float32 or float64 */
    int rank;     /* 2: rows of P, or V P; of C or of the groups, where it is narrow */
    int optional;
    size_t before; /* rows that belong to no step: w_0, the first offset */
    int kept;      /* one row a kept step */
    int per_item;  /* one row an item of a batch */
    int narrow;    /* mapped as a whole */
} pk__run_file;

static const pk__run_file pk__run_files[PK__RUN_FILES] = {
    [PK__RUN_RATES] = {.name = "learning_rates.npy", .type = PK_FLOAT64, .rank = 1},
    [PK__RUN_OFFSETS] = {.name = "batch_offsets.npy", .type = PK_INT64, .rank = 1, .before = 1},
    [PK__RUN_ITEMS] = {.name = "batch_items.npy", .type = PK_INT64, .rank = 1, .per_item = 1},
    [PK__RUN_ITEM_WEIGHTS] =
        {.name = "batch_weights.npy", .type = PK_FLOAT64, .rank = 1, .optional = 1, .per_item = 1},
    [PK__RUN_SCALES] = {.name = "gradient_scales.npy", .type = PK_FLOAT64, .rank = 1, .optional = 1},
    [PK__RUN_GROUP_RATES] =
        {.name = "group_rates.npy", .type = PK_FLOAT64, .rank = 2, .optional = 1, .narrow = 1},
    [PK__RUN_MOMENTA] = {.name = "momenta.npy", .type = PK_FLOAT64, .rank = 1, .optional = 1},
    [PK__RUN_LOSS_GRADIENTS] =
        {.name = "loss_gradients.npy", .rank = 2, .optional = 1, .per_item = 1, .narrow = 1},
    [PK__RUN_CHECKSUMS] = {.name = "checksums.npy", .type = PK_INT64, .rank = 1, .before = 1},
    [PK__RUN_MOMENTS] = {.name = "second_moments.npy", .rank = 2, .optional = 1},
    [PK__RUN_STATES] = {.name = "optimizer_states.npy", .type = PK_FLOAT64, .rank = 2, .before = 1, .kept = 1},
    [PK__RUN_WEIGHTS] = {.name = "weights.npy", .rank = 2, .before = 1, .kept = 1},
};

/* Whether a run with this optimizer and keep_every has such a file: 1: it must, 0: it must not, -1: it may. */
static int pk__run_has(int file, size_t keep_every, const pk_optimizer *optimizer,
                       const pk_parameter_groups *groups)
{
    if (file == PK__RUN_GROUP_RATES)
        return groups->count ? -1 : 0;
    if (file == PK__RUN_CHECKSUMS)
        return keep_every > 1;
    if (file == PK__RUN_STATES)
        return keep_every > 1 && pk_parameter_groups_state_vectors(optimizer, groups) > 0;
    if ((file == PK__RUN_MOMENTS || file == PK__RUN_LOSS_GRADIENTS || file == PK__RUN_MOMENTA) && keep_every > 1)
        return 0;
    return pk__run_files[file].optional ? -1 : 1;
}

/* A checksum of the bits of P weights and of `count` numbers of the optimizer's state, as doubles, which a replay is
 * compared with. Four independent hashes of every fourth number are combined in the end, so that the multiplications do
 * not wait for each other. */
static uint64_t pk__checksum_mix(uint64_t hash, uint64_t bits)
{
    hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

PK__PRIVATE int64_t pk__checksum(const pk_real *weights, size_t parameters, const pk_real *state, size_t count)
{
    uint64_t lane[4] = {1, 2, 3, 4}, hash = parameters;
    const pk_real *part[2] = {weights, state};
    const size_t numbers[2] = {parameters, state ? count : 0};
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < numbers[k]; i++) {
            double number = (double)part[k][i];
            uint64_t bits;
            memcpy(&bits, &number, sizeof bits);
            lane[i % 4] = pk__checksum_mix(lane[i % 4], bits);
        }
    for (int k = 0; k < 4; k++)
        hash = pk__checksum_mix(hash, lane[k]);
    int64_t signed_hash;
    memcpy(&signed_hash, &hash, sizeof signed_hash);
    return signed_hash;
}

/* Puts a prefix before the message of an error that another module reported. */
PK__FORMAT(3, 4)
PK__PRIVATE pk_status pk__prefix(pk_context *context, pk_status status, const char *format, ...)
{
    if (context && status) {
        char message[PK_MESSAGE_SIZE];
        memcpy(message, context->message, sizeof message);
        va_list arguments;
        va_start(arguments, format);
        int length = vsnprintf(context->message, sizeof context->message, format, arguments);
        va_end(arguments);
        if (length >= 0 && (size_t)length < sizeof message) {
            size_t room = sizeof message - (size_t)length - 1;
            memcpy(context->message + length, message, room);
            context->message[sizeof message - 1] = '\0';
        }
        pk__clean_message(context);
    }
    return status;
}

/* out (P) = a row of weights.npy or second_moments.npy. step: of the row, for the message. */
static pk_status pk__run_row(pk_context *context, const pk_run *run, const pk_array *array, const char *name,
                             size_t row, size_t step, pk_real *out)
{
    pk_status status = pk_array_read(context, array, row * run->parameters, run->parameters, out);
    if (status)
        return pk__prefix(context, status, "%s: the row of step %zu ", name, step);
    for (size_t p = 0; p < run->parameters; p++)
        if (!isfinite(out[p]))
            return pk__fail(context, PK_NOT_FINITE, "%s: parameter %zu at step %zu is %g", name, p, step,
                            (double)out[p]);
    return PK_OK;
}

/* The files that do not grow; the manifest is written last. */
enum { PK__RUN_INPUTS, PK__RUN_TARGETS, PK__RUN_INITIAL, PK__RUN_MANIFEST, PK__RUN_FIXED };
static const char *const pk__run_fixed[PK__RUN_FIXED] = {"train_inputs.npy", "train_targets.npy",
                                                         "initial_state.npy", "run.txt"};

#ifdef PATHKERNEL_FLOAT
#define PK__REAL_TYPE PK_FLOAT32
#else
#define PK__REAL_TYPE PK_FLOAT64
#endif

enum { PK__CONSTANT_FILE = PK_CONSTANT_NAME + 16 }; /* the bytes of constant_NAME.npy */

/* directory/name in one buffer that fits every file of a run. */
typedef struct pk__run_path {
    const char *directory;
    char *text;
    size_t size;
} pk__run_path;

static pk_status pk__run_path_take(pk_context *context, const char *directory, pk__run_path *path)
{
    path->directory = directory;
    path->size = strlen(directory) + 1 + PK__CONSTANT_FILE; /* the longest name */
    return pk_allocate(context, path->size, 1, "the path of a run", &path->text);
}

static const char *pk__run_path_of(pk__run_path *path, const char *name)
{
    snprintf(path->text, path->size, "%s/%s", path->directory, name);
    return path->text;
}

static pk_status pk__run_io(pk_context *context, const char *path)
{
    return pk__fail(context, PK_IO, "%s: %s", path, strerror(errno));
}

/* ---- the manifest ---------------------------------------------------------------------------------- */

/* The first three are in every manifest. */
enum {
    PK__MANIFEST_NETWORK,
    PK__MANIFEST_LOSS,
    PK__MANIFEST_OPTIMIZER,
    PK__MANIFEST_KEEP,
    PK__MANIFEST_INITIAL,
    PK__MANIFEST_KEYS
};
static const char *const pk__manifest_keys[PK__MANIFEST_KEYS] = {"network", "loss", "optimizer", "keep_every",
                                                                 "initial_step"};
enum { PK__MANIFEST_LINE = 1 << 16, PK__MANIFEST_SIZE = 1 << 20 }; /* bytes at most */

typedef struct pk__manifest {
    char *value[PK__MANIFEST_KEYS]; /* inside the text that was split */
    size_t line[PK__MANIFEST_KEYS]; /* counted from 1; 0: not there */
    const char *group[PK_GROUPS_MOST];
    size_t group_line[PK_GROUPS_MOST], groups;
} pk__manifest;

static int pk__blank(char c)
{
    return c == ' ' || c == '\t';
}

/* Parses one line, without its line break; key and value are terminated in place. *version: whether the version line was read. */
static pk_status pk__manifest_line(pk_context *context, char *begin, char *end, size_t line, int *version,
                                   pk__manifest *manifest)
{
    if (end - begin > PK__MANIFEST_LINE)
        return pk__fail(context, PK_FORMAT, "run.txt line %zu: longer than %d bytes", line,
                        (int)PK__MANIFEST_LINE);
    for (char *c = begin; c < end; c++)
        if ((unsigned char)*c < 32 && *c != '\t')
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: a control character (0x%02x) in column %zu",
                            line, (unsigned)(unsigned char)*c, (size_t)(c - begin) + 1);
    char *comment = (char *)memchr(begin, '#', (size_t)(end - begin));
    if (comment)
        end = comment;
    while (begin < end && pk__blank(*begin))
        begin++;
    while (end > begin && pk__blank(end[-1]))
        end--;
    if (begin == end)
        return PK_OK;
    *end = '\0'; /* instead of a line break, a comment or a blank */
    char *value = begin;
    while (*value && !pk__blank(*value))
        value++;
    while (pk__blank(*value))
        *value++ = '\0';
    if (!*version) {
        if (strcmp(begin, "pathkernel-run") != 0)
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: expected 'pathkernel-run 1', found '%.60s'",
                            line, begin);
        if (strcmp(value, "1") != 0)
            return pk__fail(context, PK_UNSUPPORTED, "run.txt line %zu: version '%.20s'; this library reads 1",
                            line, value);
        *version = 1;
        return PK_OK;
    }
    if (strcmp(begin, "group") == 0) {
        if (!*value)
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: 'group' has no value", line);
        if (manifest->groups == PK_GROUPS_MOST)
            return pk__fail(context, PK_UNSUPPORTED, "run.txt line %zu: more than %d groups", line,
                            (int)PK_GROUPS_MOST);
        manifest->group[manifest->groups] = value;
        manifest->group_line[manifest->groups++] = line;
        return PK_OK;
    }
    for (int k = 0; k < PK__MANIFEST_KEYS; k++) {
        if (strcmp(begin, pk__manifest_keys[k]) != 0)
            continue;
        if (manifest->line[k])
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: '%s' again, it stands on line %zu already",
                            line, begin, manifest->line[k]);
        if (!*value)
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: '%s' has no value", line, begin);
        manifest->line[k] = line;
        manifest->value[k] = value;
        return PK_OK;
    }
    return pk__fail(context, PK_FORMAT,
                    "run.txt line %zu: unknown key '%.60s' (known: network, loss, optimizer, group, "
                    "keep_every, initial_step)",
                    line, begin);
}

/* Splits text (`size` bytes and a terminating NUL) into lines, in place. */
static pk_status pk__manifest_split(pk_context *context, char *text, size_t size, pk__manifest *manifest)
{
    memset(manifest, 0, sizeof *manifest);
    int version = 0;
    size_t line = 0;
    for (size_t at = 0; at < size;) {
        char *begin = text + at, *feed = (char *)memchr(begin, '\n', size - at);
        char *end = feed ? feed : text + size;
        at = (size_t)(end - text) + 1;
        if (end > begin && end[-1] == '\r')
            end--;
        pk_status status = pk__manifest_line(context, begin, end, ++line, &version, manifest);
        if (status)
            return status;
    }
    if (!version)
        return pk__fail(context, PK_FORMAT, "run.txt line 1: expected 'pathkernel-run 1', found an empty file");
    for (int k = 0; k < PK__MANIFEST_KEEP; k++)
        if (!manifest->line[k])
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: the file ends without a '%s' line", line,
                            pk__manifest_keys[k]);
    return PK_OK;
}

/* The value of a key, where it is there: a decimal whole number from least to PK_KEEP_EVERY_MOST, without a sign. */
static pk_status pk__manifest_whole(pk_context *context, const pk__manifest *manifest, int key, size_t least,
                                    size_t *number)
{
    const char *text = manifest->value[key];
    if (!manifest->line[key])
        return PK_OK;
    size_t value = 0, length = 0;
    for (; text[length] >= '0' && text[length] <= '9' && length < 10; length++)
        value = 10 * value + (size_t)(text[length] - '0');
    if (text[length] || !length || value < least || value > PK_KEEP_EVERY_MOST)
        return pk__fail(context, PK_FORMAT, "%s '%.60s' is not a whole number from %zu to %d",
                        pk__manifest_keys[key], text, least, (int)PK_KEEP_EVERY_MOST);
    *number = value;
    return PK_OK;
}

static pk_status pk__manifest_values(pk_context *context, const pk__manifest *manifest,
                                     const pk_constants *constants, pk_graph *graph, pk_criterion *criterion,
                                     pk_optimizer *optimizer, pk_parameter_groups *groups, size_t *keep_every)
{
    int key = PK__MANIFEST_KEEP;
    size_t initial_step = 0;
    *keep_every = 1;
    pk_status status = pk__manifest_whole(context, manifest, key, 1, keep_every);
    if (!status) {
        key = PK__MANIFEST_INITIAL;
        status = pk__manifest_whole(context, manifest, key, 0, &initial_step);
    }
    if (!status) {
        key = PK__MANIFEST_LOSS;
        status = pk_criterion_parse(context, manifest->value[key], criterion);
    }
    if (!status) {
        key = PK__MANIFEST_OPTIMIZER;
        status = pk_optimizer_parse(context, manifest->value[key], optimizer);
        optimizer->initial_step = initial_step; /* before the groups, which have the same */
        optimizer->initial_state = manifest->line[PK__MANIFEST_INITIAL] != 0;
    }
    if (!status) {
        key = PK__MANIFEST_NETWORK;
        status = pk_network_parse_with(context, manifest->value[key], constants, graph);
    }
    size_t line = manifest->line[key], at = 0;
    if (!status) {
        status = pk__groups_parse(context, graph, optimizer, manifest->groups, manifest->group, groups, &at);
        if (status) {
            line = at < manifest->groups ? manifest->group_line[at] : line;
            pk_graph_release(context, graph);
        }
    }
    for (size_t g = 0; !status && g < groups->count; g++)
        groups->group[g].line = manifest->group_line[g];
    if (status)
        pk_criterion_release(context, criterion);
    return pk__prefix(context, status, "run.txt line %zu: ", line);
}

/* Parses text (`size` bytes and a terminating NUL), which is changed. Graph and criterion, zeroed before, stay so after an error. */
PK__PRIVATE pk_status pk__manifest_parse(pk_context *context, char *text, size_t size,
                                         const pk_constants *constants, pk_graph *graph,
                                         pk_criterion *criterion, pk_optimizer *optimizer,
                                         pk_parameter_groups *groups, size_t *keep_every)
{
    pk__manifest *manifest = NULL; /* too large for a thread's stack */
    pk_status status = pk_allocate(context, 1, sizeof *manifest, "the lines of run.txt", &manifest);
    if (!status)
        status = pk__manifest_split(context, text, size, manifest);
    if (!status)
        status =
            pk__manifest_values(context, manifest, constants, graph, criterion, optimizer, groups, keep_every);
    pk_release(context, manifest);
    return status;
}

static const char *pk__constant_file(const char *name, char *text)
{
    snprintf(text, PK__CONSTANT_FILE, "constant_%s.npy", name);
    return text;
}

static pk_status pk__load_from_run(void *user, pk_context *context, const char *name, pk_array *array)
{
    char file[PK__CONSTANT_FILE];
    return pk_array_map(context, pk__run_path_of((pk__run_path *)user, pk__constant_file(name, file)), 0,
                        array);
}

static pk_status pk__manifest_read(pk_context *context, pk__run_path *directory, pk_run *run)
{
    const char *path = pk__run_path_of(directory, "run.txt");
    const char *kind;
    int file = pk__open_regular(AT_FDCWD, path, O_RDONLY, &kind);
    if (file < 0 && kind)
        return pk__fail(context, PK_IO, "%s is not a regular file but %s", path, kind);
    if (file < 0)
        return pk__run_io(context, path);
    struct stat about;
    pk_status status = PK_OK;
    if (fstat(file, &about) != 0)
        status = pk__run_io(context, path);
    /* One byte past the limit tells that the file is longer. */
    size_t limit = (size_t)PK__MANIFEST_SIZE + 1, size = 0;
    char *text = NULL;
    if (!status) {
        if (about.st_size < (off_t)limit)
            limit = (size_t)about.st_size;
        status = pk_allocate(context, limit + 1, 1, "the text of run.txt", &text);
    }
    while (!status && size < limit) {
        ssize_t count = read(file, text + size, limit - size);
        if (count > 0)
            size += (size_t)count;
        else if (count == 0)
            break;
        else if (errno != EINTR)
            status = pk__run_io(context, path);
    }
    close(file);
    if (!status) {
        const pk_constants constants = {pk__load_from_run, directory};
        text[size] = '\0';
        status = pk__manifest_parse(context, text, size, &constants, &run->graph, &run->criterion,
                                    &run->optimizer, &run->groups, &run->keep_every);
        if (!status && size > PK__MANIFEST_SIZE)
            status = pk__fail(context, PK_FORMAT, "run.txt is longer than %d bytes", (int)PK__MANIFEST_SIZE);
    }
    pk_release(context, text);
    return status;
}

/* ---- reading a run --------------------------------------------------------------------------------- */

static pk_array *pk__run_array(pk_run *run, int file)
{
    return file == PK__RUN_WEIGHTS   ? &run->weights
           : file == PK__RUN_MOMENTS ? &run->second_moments
           : file == PK__RUN_STATES  ? &run->optimizer_states
           : file == PK__RUN_MOMENTA ? &run->momenta
           : file == PK__RUN_LOSS_GRADIENTS
               ? &run->loss_gradients
               : &run->columns[file];
}

PK_API const pk_array *pk_run_array(const pk_run *run, size_t index, const char **name)
{
    if (index >= PK__RUN_FILES + PK__RUN_MANIFEST)
        return NULL;
    const int fixed = (int)index - PK__RUN_FILES;
    *name = fixed < 0 ? pk__run_files[index].name : pk__run_fixed[fixed];
    return fixed < 0                  ? pk__run_array((pk_run *)run, (int)index) /* only read */
           : fixed == PK__RUN_INPUTS  ? &run->train.inputs
           : fixed == PK__RUN_TARGETS ? &run->train.targets
                                      : &run->initial_state;
}

/* NULL if items of this type are allowed in a growing file, else the words for those that are. Rates are float64 only: 0.1
 * as float32 is another number, which the optimizer did not use. */
static const char *pk__run_wants(int file, pk_type type)
{
    const int numbers = file == PK__RUN_OFFSETS || file == PK__RUN_ITEMS;
    if (numbers)
        return pk_type_is_integer(type) && type != PK_BOOL ? NULL : "integers";
    if (file == PK__RUN_ITEM_WEIGHTS || file == PK__RUN_SCALES)
        return NULL;
    if (pk__run_files[file].type)
        return type == pk__run_files[file].type ? NULL : pk_type_name(pk__run_files[file].type);
    return type == PK_FLOAT64 || type == PK_FLOAT32 ? NULL : "float64 or float32";
}

/* Replaces a mapped array of another type by a converted copy, as int64 or float64. */
static pk_status pk__run_convert(pk_context *context, const char *path, pk_type type, pk_array *array)
{
    const size_t items = pk_array_items(array);
    pk_array made = *array;
    made.type = type;
    made.mapping = NULL;
    made.owned = NULL;
    made.file = 0;
    pk_status status = pk_allocate(context, items, pk_type_size(type), path, &made.owned);
    if (status)
        return status;
    made.data = made.owned;
    if (type == PK_INT64)
        pk_array_integers(array, 0, items, (int64_t *)made.owned);
    for (size_t i = 0; type == PK_FLOAT64 && i < items; i++) {
        int64_t integer = 0;
        if (array->type == PK_FLOAT32)
            ((double *)made.owned)[i] = (double)((const float *)array->data)[i];
        else {
            pk_array_integers(array, i, 1, &integer);
            ((double *)made.owned)[i] = (double)integer;
        }
    }
    pk_array_release(context, array);
    *array = made;
    return PK_OK;
}

/* Maps one of the growing files and checks its type and the shape of its rows. */
static pk_status pk__run_map(pk_context *context, pk__run_path *path, int file, pk_run *run)
{
    const pk__run_file *expected = &pk__run_files[file];
    pk_array *array = pk__run_array(run, file);
    pk__run_path_of(path, expected->name);
    int has = pk__run_has(file, run->keep_every, &run->optimizer, &run->groups);
    struct stat about;
    if (has <= 0 && lstat(path->text, &about) != 0 &&
        errno == ENOENT) /* a dangling link is an error, not an absent file */
        return PK_OK;
    if (!has && file == PK__RUN_MOMENTS)
        return pk__fail(context, PK_FORMAT, "%s: a run with keep_every has optimizer_states.npy in its place",
                        path->text);
    if (!has && file == PK__RUN_GROUP_RATES)
        return pk__fail(context, PK_FORMAT, "%s: run.txt has no group line", path->text);
    if (!has) /* other programs may leave files of their own */
        return PK_OK;
    if (file == PK__RUN_LOSS_GRADIENTS && run->loss != PK_RECORDED)
        return pk__fail(context, PK_FORMAT, "%s: the loss in run.txt is %s, not recorded", path->text,
                        pk_loss_name(run->loss));
    const int wide = expected->rank == 2 && !expected->narrow;
    const unsigned flags = PK_ARRAY_PARTIAL | (wide ? PK_ARRAY_KEEP_OPEN : 0);
    pk_status status = pk_array_map(context, path->text, flags, array);
    if (status)
        return status;
    const char *wanted = pk__run_wants(file, array->type);
    if (wanted)
        return pk__fail(context, PK_FORMAT, "%s holds %s, it has to hold %s", path->text,
                        pk_type_name(array->type), wanted);
    if (array->rank != expected->rank)
        return pk__fail(context, PK_SHAPE, "%s has %d dimensions, it has to have %d", path->text, array->rank,
                        expected->rank);
    if (file == PK__RUN_GROUP_RATES && array->shape[1] != run->groups.count)
        return pk__fail(context, PK_SHAPE, "%s has %zu columns, run.txt has %zu group lines", path->text,
                        array->shape[1], run->groups.count);
    if (file == PK__RUN_LOSS_GRADIENTS && array->shape[1] != run->outputs)
        return pk__fail(context, PK_SHAPE, "%s has rows of %zu numbers, the network has %zu outputs", path->text,
                        array->shape[1], run->outputs);
    size_t vectors =
        file == PK__RUN_STATES ? pk_parameter_groups_state_vectors(&run->optimizer, &run->groups) : 1;
    if (wide && (array->shape[1] / vectors != run->parameters || array->shape[1] % vectors))
        return pk__fail(context, PK_SHAPE, "%s has rows of %zu numbers, the network has %zu parameters%s",
                        path->text, array->shape[1], run->parameters,
                        vectors > 1 ? " and the optimizer two vectors" : "");
    if (array->shape[0] < expected->before)
        return pk__fail(context, PK_FORMAT, "%s holds no row, not even that of the start", path->text);
    return expected->type && array->type != expected->type
               ? pk__run_convert(context, path->text, expected->type, array)
               : PK_OK;
}

/* The numbers of initial_state.npy: finite, and those that a root is taken of not negative. */
static pk_status pk__run_check_state(pk_context *context, const char *path, const pk_run *run)
{
    const size_t P = run->parameters;
    const pk_parameter_range all = {0, P, 0};
    const size_t ranges = run->groups.count ? run->groups.range_count : 1;
    pk_real numbers[512];
    for (size_t i = 0; i < run->initial_state.shape[0] * ranges; i++) {
        const size_t vector = i / ranges;
        const pk_parameter_range *range = run->groups.count ? &run->groups.range[i % ranges] : &all;
        const int root = !pk__group_frozen(&run->groups, range->group) &&
                         pk__optimizer_not_negative(
                             pk__group_optimizer(&run->optimizer, &run->groups, range->group), vector);
        for (size_t at = 0; at < range->count; at += sizeof numbers / sizeof *numbers) {
            const size_t first = range->first + at,
                         count = pk__min(range->count - at, sizeof numbers / sizeof *numbers);
            pk_status status = pk_array_read(context, &run->initial_state, vector * P + first, count, numbers);
            if (status)
                return pk__prefix(context, status, "%s ", path);
            for (size_t k = 0; k < count; k++) {
                if (!isfinite(numbers[k]))
                    return pk__fail(context, PK_NOT_FINITE, "%s holds %g at row %zu, column %zu", path,
                                    (double)numbers[k], vector, first + k);
                if (root && numbers[k] < 0)
                    return pk__fail(
                        context, PK_FORMAT,
                        "%s holds %g at row %zu, column %zu; the optimizer divides by its root, so that "
                        "it must be >= 0",
                        path, (double)numbers[k], vector, first + k);
            }
        }
    }
    return PK_OK;
}

/* Maps initial_state.npy, which is there exactly where run.txt has an initial_step and the optimizer has a state. */
static pk_status pk__run_map_state(pk_context *context, pk__run_path *path, pk_run *run)
{
    const size_t vectors = pk_parameter_groups_state_vectors(&run->optimizer, &run->groups);
    pk_array *array = &run->initial_state;
    char rule[256] = "";
    struct stat about;
    pk__run_path_of(path, pk__run_fixed[PK__RUN_INITIAL]);
    const int absent = lstat(path->text, &about) != 0 && errno == ENOENT;
    if (absent && !(run->optimizer.initial_state && vectors))
        return PK_OK;
    if (pk_optimizer_format(&run->optimizer, rule, sizeof rule) != PK_OK)
        rule[0] = '\0';
    if (!vectors)
        return pk__fail(context, PK_FORMAT, "%s: the optimizer '%.80s' has no state", path->text, rule);
    if (!run->optimizer.initial_state)
        return pk__fail(
            context, PK_FORMAT,
            "%s: run.txt has no initial_step line, which tells how many updates were made before step 0",
            path->text);
    if (absent)
        return pk__fail(
            context, PK_IO,
            "%s is missing: run.txt has an initial_step line, so that the optimizer '%.80s' begins with a "
            "state",
            path->text, rule);
    pk_status status = pk_array_map(context, path->text, PK_ARRAY_KEEP_OPEN, array);
    if (status)
        return status;
    if (array->type != PK_FLOAT64 && array->type != PK_FLOAT32)
        return pk__fail(context, PK_FORMAT, "%s holds %s, it has to hold float64 or float32", path->text,
                        pk_type_name(array->type));
    if (array->rank != 2 || array->shape[0] != vectors || array->shape[1] != run->parameters) {
        char has[200];
        return pk__fail(context, PK_SHAPE,
                        "%s has shape %s; the optimizer '%.80s' has %zu vector%s of %zu parameters", path->text,
                        pk__shape_text(array, has, sizeof has), rule, vectors, vectors == 1 ? "" : "s",
                        run->parameters);
    }
    return pk__run_check_state(context, path->text, run);
}

/* The index of the first of `count` numbers that is not finite, or count. */
static size_t pk__not_finite(const double *numbers, size_t count)
{
    size_t i = 0;
    while (i < count && isfinite(numbers[i]))
        i++;
    return i;
}

/* "learning_rates.npy holds 1 row", with the bytes of a part of a row. */
static const char *pk__run_rows_text(const pk_run *run, int file, char *text, size_t size)
{
    const pk_array *array = pk__run_array((pk_run *)run, file); /* only read */
    size_t used = (size_t)snprintf(text, size, "%s holds %zu row%s", pk__run_files[file].name, array->shape[0],
                                   array->shape[0] == 1 ? "" : "s");
    if (array->extra_bytes && used < size)
        snprintf(text + used, size - used, " and %zu bytes", array->extra_bytes);
    return text;
}

/* Whether the lengths of the files are those that a kill after `steps` complete steps leaves: each file has the rows of these
 * steps, and a file that is written before weights.npy may have the row of the next step or a part of it. If not, *file is one
 * with another length. */
static int pk__run_is_whole(const pk_run *run, size_t steps, int *file)
{
    const int keeps = (steps + 1) % run->keep_every == 0, last = keeps ? PK__RUN_WEIGHTS : PK__RUN_CHECKSUMS;
    const size_t items = (size_t)run->batch_offsets[steps];
    const pk_array *offsets = pk__run_array((pk_run *)run, PK__RUN_OFFSETS); /* only read, as below */
    const size_t next_items =
        offsets->shape[0] > steps + 1 ? pk__max(items, (size_t)run->batch_offsets[steps + 1]) : items;
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array((pk_run *)run, f);
        const pk__run_file *kind = &pk__run_files[f];
        const size_t least = (kind->per_item ? items : kind->kept ? steps / run->keep_every : steps) + kind->before;
        size_t most = kind->per_item ? next_items + kind->before : kind->kept && !keeps ? least : least + 1;
        if (f == last) /* its whole row would make the step complete */
            most = least;
        *file = f;
        if (array->data && (array->shape[0] < least || array->shape[0] > most ||
                            (array->shape[0] == most && array->extra_bytes && f != last)))
            return 0;
    }
    return 1;
}

/* Counts the complete steps and checks their batches. recover: files of any length are accepted. */
static pk_status pk__run_count(pk_context *context, const char *directory, int recover, pk_run *run)
{
    size_t rows[PK__RUN_FILES], steps = SIZE_MAX;
    int least = 0, shorter = PK__RUN_ITEMS;
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array(run, f);
        rows[f] = array->data ? array->shape[0] : SIZE_MAX;
        size_t reach = rows[f] - pk__run_files[f].before; /* the last step that this file allows */
        if (pk__run_files[f].kept)
            reach = rows[f] > SIZE_MAX / run->keep_every ? SIZE_MAX : rows[f] * run->keep_every - 1;
        if (array->data && !pk__run_files[f].per_item && reach < steps)
            steps = reach, least = f;
    }
    for (int f = 0; f < PK__RUN_FILES; f++)
        if (pk__run_files[f].per_item && rows[f] < rows[shorter])
            shorter = f;
    const int64_t *offsets = run->batch_offsets;
    if (offsets[0] != 0)
        return pk__fail(context, PK_FORMAT, "%s/batch_offsets.npy starts with %lld, not with 0", directory,
                        (long long)offsets[0]);
    for (size_t s = 0; s < steps; s++) {
        if (offsets[s + 1] <= offsets[s])
            return pk__fail(context, PK_FORMAT, "%s/batch_offsets.npy %s at row %zu: from %lld to %lld",
                            directory, offsets[s + 1] < offsets[s] ? "goes backwards" : "holds an empty batch",
                            s + 1, (long long)offsets[s], (long long)offsets[s + 1]);
        if ((uint64_t)offsets[s + 1] > rows[shorter])
            steps = s, least = shorter; /* ends the loop */
    }
    size_t items = (size_t)offsets[steps];
    for (size_t i = 0; i < items; i++)
        if (run->batch_items[i] < 0 || (uint64_t)run->batch_items[i] >= run->examples)
            return pk__fail(context, PK_ARGUMENT,
                            "%s/batch_items.npy holds %lld at row %zu; there are %zu examples", directory,
                            (long long)run->batch_items[i], i, run->examples);
    const double *finite[3] = {run->learning_rates, run->batch_weights, run->gradient_scales};
    const int file[3] = {PK__RUN_RATES, PK__RUN_ITEM_WEIGHTS, PK__RUN_SCALES};
    for (int k = 0; k < 3; k++) {
        size_t count = !finite[k] ? 0 : k == 1 ? items : steps, i = pk__not_finite(finite[k], count);
        if (i < count)
            return pk__fail(context, PK_NOT_FINITE, "%s/%s holds %g at row %zu", directory,
                            pk__run_files[file[k]].name, finite[k][i], i);
    }
    for (size_t i = 0; run->group_rates && i < steps * run->groups.count; i++) {
        const size_t group = i % run->groups.count;
        if (!run->groups.group[group].frozen && !(isfinite(run->group_rates[i]) && run->group_rates[i] >= 0))
            return pk__fail(context, isfinite(run->group_rates[i]) ? PK_ARGUMENT : PK_NOT_FINITE,
                            "%s/group_rates.npy holds %g at row %zu, column %zu; a rate is finite and >= 0",
                            directory, run->group_rates[i], i / run->groups.count, group);
    }
    const double *momenta = run->optimizer.momenta;
    for (size_t s = 0; momenta && s < steps; s++)
        if (!(momenta[s] > 0 && momenta[s] < 1))
            return pk__fail(context, PK_ARGUMENT, "%s/momenta.npy holds %g at row %zu; a momentum is in (0, 1)",
                            directory, momenta[s], s);
    pk_real derivatives[256];
    for (size_t i = 0, count; run->loss_gradients.data && i < items * run->outputs; i += count) {
        count = pk__min(items * run->outputs - i, sizeof derivatives / sizeof *derivatives);
        pk_array_reals(&run->loss_gradients, i, count, derivatives);
        for (size_t k = 0; k < count; k++)
            if (!isfinite(derivatives[k]))
                return pk__fail(context, PK_NOT_FINITE, "%s/loss_gradients.npy holds %g at row %zu, column %zu",
                                directory, (double)derivatives[k], (i + k) / run->outputs,
                                (i + k) % run->outputs);
    }
    run->steps = steps;
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array(run, f);
        size_t complete = pk__run_files[f].per_item ? items : pk__run_files[f].kept ? steps / run->keep_every : steps;
        complete += pk__run_files[f].before;
        if (array->data && (rows[f] > complete || array->extra_bytes))
            run->cut_off = 1;
    }
    int other = 0;
    if (!recover && !pk__run_is_whole(run, steps, &other)) {
        char has[120], also[120];
        if (least != PK__RUN_WEIGHTS && rows[PK__RUN_WEIGHTS] > steps / run->keep_every + 1)
            other = PK__RUN_WEIGHTS; /* the file that a user looks at first */
        return pk__fail(
            context, PK_SHAPE,
            "%s: %s, %s; recording that is cut off leaves at most the row of one step more in the other "
            "files than in weights.npy, so a file is wrong or a power cut lost rows; to recover the run "
            "(--recover, pk_run_recover) gives its first %zu steps",
            directory, pk__run_rows_text(run, least, has, sizeof has),
            pk__run_rows_text(run, other, also, sizeof also), steps);
    }
    if (run->cut_off)
        (void)pk__fail(context, PK_OK, "%s was cut off after step %zu: %s ends first, with %zu whole rows",
                       directory, steps, pk__run_files[least].name, rows[least]);
    return PK_OK;
}

/* Checks inputs and targets against network and loss, for readers and recorders. criterion NULL: of the targets, only their
 * number. */
PK__PRIVATE pk_status pk__run_check_data(pk_context *context, const pk_dataset *train, const pk_graph *graph,
                                         const pk_criterion *criterion)
{
    pk_status status = criterion ? pk__dataset_check_targets(context, train, graph->output_width) : PK_OK;
    if (!status)
        status = pk__dataset_check_inputs(context, train, graph->input_width);
    if (!status)
        status = pk_array_check_rows(context, &train->inputs, graph->input_shape.rank, graph->input_shape.dims,
                                     "inputs");
    if (!status && criterion)
        status = pk_criterion_check(context, criterion, train, graph->output_width);
    if (!status && pk_array_length(&train->targets) != pk_array_length(&train->inputs))
        status = pk__fail(context, PK_SHAPE, "%zu rows of targets for %zu rows of inputs",
                          pk_array_length(&train->targets), pk_array_length(&train->inputs));
    if (status || !graph->checked)
        return status;
    pk_real *row = NULL;
    status = pk_allocate(context, graph->input_width, sizeof *row, "a row of inputs", &row);
    for (size_t i = 0; !status && i < pk_dataset_examples(train); i++) {
        const int64_t item = (int64_t)i;
        pk_dataset_inputs(train, &item, 1, row);
        status = pk_graph_check_inputs(context, graph, i, row);
    }
    pk_release(context, row);
    return status;
}

static pk_status pk__run_load(pk_context *context, pk__run_path *path, int recover, pk_run *run)
{
    pk_status status = pk__manifest_read(context, path, run);
    if (status)
        return status;
    run->loss = run->criterion.loss;
    run->parameters = run->graph.parameters;
    run->outputs = run->graph.output_width;
    for (int f = 0; f < PK__RUN_FILES && !status; f++)
        status = pk__run_map(context, path, f, run);
    if (!status)
        status = pk__run_map_state(context, path, run);
    pk_array *data[2] = {&run->train.inputs, &run->train.targets};
    for (int k = 0; k < 2 && !status; k++) {
        status = pk_array_map(context, pk__run_path_of(path, pk__run_fixed[k]), 0, data[k]);
    }
    if (status)
        return status;
    status = pk__run_check_data(context, &run->train, &run->graph,
                                run->loss_gradients.data ? NULL : &run->criterion);
    if (status)
        return pk__prefix(context, status, "%s: train_inputs.npy, train_targets.npy: ", path->directory);
    if (run->second_moments.data && run->optimizer.kind != PK_SGD &&
        pk__groups_moments(&run->optimizer, &run->groups) == SIZE_MAX)
        return pk__fail(context, PK_UNSUPPORTED, "%s/second_moments.npy: %s", path->directory,
                        pk__no_moments(&run->optimizer));
    run->examples = pk_dataset_examples(&run->train);
    run->learning_rates = (const double *)run->columns[PK__RUN_RATES].data;
    run->batch_offsets = (const int64_t *)run->columns[PK__RUN_OFFSETS].data;
    run->batch_items = (const int64_t *)run->columns[PK__RUN_ITEMS].data;
    run->batch_weights = (const double *)run->columns[PK__RUN_ITEM_WEIGHTS].data;
    run->gradient_scales = (const double *)run->columns[PK__RUN_SCALES].data;
    run->checksums = (const int64_t *)run->columns[PK__RUN_CHECKSUMS].data;
    run->group_rates = (const double *)run->columns[PK__RUN_GROUP_RATES].data;
    run->optimizer.momenta = (const double *)run->momenta.data;
    if (run->momenta.data && !pk__optimizer_has_momentum(&run->optimizer))
        return pk__fail(context, PK_FORMAT, "%s/momenta.npy: the optimizer in run.txt has no momentum that moves",
                        path->directory);
    for (size_t g = 0; g < run->groups.count; g++) {
        pk_parameter_group *group = &run->groups.group[g];
        group->optimizer.momenta = run->optimizer.momenta;
        if (run->momenta.data && (group->optimizer.momentum != run->optimizer.momentum ||
                                  group->optimizer.beta1 != run->optimizer.beta1))
            return pk__fail(context, PK_FORMAT,
                            "run.txt line %zu: a momentum of the group's own beside momenta.npy, which has that of all",
                            group->line);
        if (run->group_rates ? group->rated : !group->keys && !group->frozen)
            return pk__fail(context, PK_FORMAT,
                            run->group_rates ? "run.txt line %zu: rate= beside group_rates.npy, which has the "
                                               "rates of the groups"
                                             : "run.txt line %zu: a group without a key, and there is no "
                                               "group_rates.npy",
                            group->line);
    }
    return pk__run_count(context, path->directory, recover, run);
}

/* Reads the run in a directory. */
static pk_status pk__run_read(pk_context *context, const char *directory, int recover, pk_run *run)
{
    pk__run_path path;
    pk_status status = pk__run_path_take(context, directory, &path);
    memset(run, 0, sizeof *run);
    if (status)
        return status;
    status = pk__run_load(context, &path, recover, run);
    pk_release(context, path.text);
    if (status)
        pk_run_release(context, run);
    return status;
}

static pk_status pk__run_open(pk_context *context, const char *directory, int recover, pk_run *run)
{
    if (!directory || !run)
        return pk__fail(context, PK_ARGUMENT, "pk_run_open: %s is NULL", directory ? "run" : "directory");
    pk_run opened;
    pk_status status = pk__run_read(context, directory, recover, &opened);
    if (!status)
        *run = opened;
    if (status != PK_MEMORY_LIMIT)
        return status;
    /* The least that would do, which only opening it without the limit can tell. A run takes little but the arrays
     * that its network names. */
    pk_context unlimited = *context;
    unlimited.memory_limit = 0;
    unlimited.memory_peak = unlimited.memory_used;
    if (pk__run_read(&unlimited, directory, recover, &opened) != PK_OK)
        return status;
    pk_run_release(&unlimited, &opened);
    return pk__fail(context, PK_MEMORY_LIMIT,
                    "%s: opening the run within %zu bytes is not possible; the least that would do is %zu",
                    directory, context->memory_limit, unlimited.memory_peak);
}

PK_API pk_status pk_run_open(pk_context *context, const char *directory, pk_run *run)
{
    return pk__run_open(context, directory, 0, run);
}

PK_API pk_status pk_run_recover(pk_context *context, const char *directory, pk_run *run)
{
    return pk__run_open(context, directory, 1, run);
}

PK_API pk_status pk_run_until(pk_context *context, pk_run *run, size_t steps)
{
    if (!run || !run->weights.data)
        return pk__fail(context, PK_ARGUMENT, "pk_run_until: no run");
    if (steps > run->steps)
        return pk__fail(context, PK_ARGUMENT, "the weights after step %zu: the run has %zu steps", steps,
                        run->steps);
    run->steps = steps;
    return PK_OK;
}

PK_API pk_status pk_run_check_inputs(pk_context *context, const pk_run *run, const pk_array *inputs,
                                     const char *name)
{
    if (!run || !run->graph.node_count || !run->train.inputs.rank)
        return pk__fail(context, PK_ARGUMENT, "pk_run_check_inputs: no run");
    const pk_shape *shape = &run->graph.input_shape;
    pk_status status = pk_array_check_rows(context, inputs, shape->rank, shape->dims, name);
    if (status)
        return status;
    const pk_array *train = &run->train.inputs;
    char has[200], also[200];
    if (pk_array_check_rows(NULL, inputs, train->rank - 1, train->shape + 1, name) != PK_OK)
        return pk__fail(context, PK_SHAPE,
                        "%s has shape %s, the training inputs %s: the axes have another order", name,
                        pk__shape_text(inputs, has, sizeof has), pk__shape_text(train, also, sizeof also));
    return PK_OK;
}

PK_API void pk_run_release(pk_context *context, pk_run *run)
{
    if (!run)
        return;
    for (int f = 0; f < PK__RUN_FILES; f++)
        pk_array_release(context, pk__run_array(run, f));
    pk_array_release(context, &run->initial_state);
    pk_dataset_release(context, &run->train);
    pk_parameter_groups_release(context, &run->groups);
    pk_criterion_release(context, &run->criterion);
    pk_graph_release(context, &run->graph);
    memset(run, 0, sizeof *run);
}

PK_API void pk_run_batch(const pk_run *run, size_t step, pk_batch *batch)
{
    size_t first = (size_t)run->batch_offsets[step];
    batch->count = (size_t)run->batch_offsets[step + 1] - first;
    batch->items = run->batch_items ? run->batch_items + first : NULL;
    batch->weights = run->batch_weights ? run->batch_weights + first : NULL;
}

PK_API double pk_run_gradient_scale(const pk_run *run, size_t step)
{
    return run->gradient_scales ? run->gradient_scales[step] : 1;
}

PK_API const double *pk_run_group_rates(const pk_run *run, size_t step)
{
    return run->group_rates ? run->group_rates + step * run->groups.count : NULL;
}

PK_API const pk_array *pk_run_loss_gradients(const pk_run *run, size_t step, size_t *row)
{
    *row = (size_t)run->batch_offsets[step];
    return run->loss_gradients.data ? &run->loss_gradients : NULL;
}

PK_API pk_status pk_run_weights(pk_context *context, const pk_run *run, size_t step, pk_real *weights)
{
    if (!run || !weights || !run->weights.data)
        return pk__fail(context, PK_ARGUMENT, "pk_run_weights: no run or no weights");
    if (step > run->steps)
        return pk__fail(context, PK_ARGUMENT, "weights of step %zu: the run has %zu steps", step, run->steps);
    if (step % run->keep_every)
        return pk__fail(
            context, PK_ARGUMENT,
            "weights of step %zu: the run keeps every %zuth step; pk_replay_weights repeats the others", step,
            run->keep_every);
    return pk__run_row(context, run, &run->weights, "weights.npy", step / run->keep_every, step, weights);
}

PK_API pk_status pk_run_second_moments(pk_context *context, const pk_run *run, size_t step, pk_real *moments)
{
    if (!run || !moments || !run->second_moments.data)
        return pk__fail(context, PK_ARGUMENT, "second moments: %s",
                        run && moments ? "the run has no second_moments.npy" : "an argument is NULL");
    if (step >= run->steps)
        return pk__fail(context, PK_ARGUMENT, "second moments of step %zu: the run has %zu steps", step,
                        run->steps);
    pk_status status =
        pk__run_row(context, run, &run->second_moments, "second_moments.npy", step, step, moments);
    for (size_t i = 0; !status && i < run->parameters; i++)
        if (moments[i] < 0)
            status = pk__fail(context, PK_FORMAT,
                              "second_moments.npy: parameter %zu at step %zu is %g; it must be >= 0", i, step,
                              (double)moments[i]);
    return status;
}

PK_API pk_status pk_run_initial_state(pk_context *context, const pk_run *run, pk_real *state)
{
    if (!run || !run->weights.data)
        return pk__fail(context, PK_ARGUMENT, "pk_run_initial_state: no run");
    const size_t vectors = pk_parameter_groups_state_vectors(&run->optimizer, &run->groups);
    if (!vectors)
        return PK_OK;
    if (!state)
        return pk__fail(context, PK_ARGUMENT, "pk_run_initial_state: no place for the state");
    if (!run->initial_state.data) {
        memset(state, 0, vectors * run->parameters * sizeof *state);
        return PK_OK;
    }
    return pk__prefix(context, pk_array_read(context, &run->initial_state, 0, vectors * run->parameters, state),
                      "initial_state.npy ");
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
