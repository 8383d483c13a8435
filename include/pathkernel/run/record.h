/* pathkernel/run/record.h: writes the run directory of run.h while training, and resumes it.
 *
 * Each step appends one row to every file with one write(2) each, weights.npy last; run.txt is put in place
 * last of all when a run starts. A kill at any moment loses the step in flight at most.
 *
 * Resuming needs the optimizer's state. A run that records every k-th step only has it at these steps. A run that records
 * every step has it in resume_state.npy, as it was at step 16, 32, ...; it is written once the step after is complete.
 * Training then resumes at most 17 steps before the end, and checks that it comes to the same weights at least once.
 *
 * resume_state.npy has the last two states, each with a hash, and they are overwritten in turn, so that one of them is
 * complete at any time. The file is optional: without it, all steps are computed again. It is also written during that
 * computation, near the end after each step, so that training makes progress even if it is stopped after a few steps
 * again and again.
 */
#ifndef PATHKERNEL_RECORD_H
#define PATHKERNEL_RECORD_H
#include "run.h"

/* >>> declarations */
PK__BEGIN_C

/* What to record. The texts are those of run.txt; they are written in canonical form. */
typedef struct pk_recorder_options {
    const char *network;           /* "input 64; dense 32; tanh; dense 10" */
    const pk_constants *constants; /* of a network that names arrays; they are copied into the run */
    const char *loss;              /* "softmax_cross_entropy label_smoothing=0.1" */
    const char *optimizer;         /* "adamw beta2=0.98"; NULL: "sgd" */
    const char *const *groups;     /* group lines such as "1,3 weight_decay=0" (groups.h); NULL: none */
    size_t group_count;
    /* Of training that goes on from a state which an optimizer had reached before (run.h): its vectors (V P), and how many updates
     * it had made; NULL: it begins without one. */
    const pk_real *initial_state;
    size_t initial_step;
    int group_rates;     /* 1: record group_rates.npy: pk_recorder_group_rates before each step */
    int float32;         /* 1: weights (and second moments) as float32; default float64 */
    int batch_weights;   /* 1: record batch_weights.npy */
    int gradient_scales; /* 1: record gradient_scales.npy */
    int second_moments;  /* 1: record second_moments.npy */
    int resume;          /* 1: continue the run in the directory, if there is one */
    int replace;         /* 1: remove the run in the directory first, if there is one */
    /* k > 1: keep the weights and the optimizer's state of steps 0, k, 2k, ... only; the steps between are
     * replayed (revisit.h), so each has to be made by pk_training_step and given to pk_recorder_training_step.
     * Not with float32 (unless pk_real is float) or second_moments. 0 or 1: keep every step. */
    size_t keep_every;
} pk_recorder_options;

/* A recording in progress. A zeroed recorder is closed. */
typedef struct pk_recorder {
    size_t steps, parameters, examples; /* read only: complete steps on disk, P, N */
    /* private: */
    size_t keep_every, state_numbers; /* k; numbers of the optimizer's state, V P */
    size_t moments;                   /* the vector of the state that second_moments.npy has */
    pk_array_writer files[12];
    int present[12];
    double *group_rates; /* of the next step */
    size_t group_count;
    int float32, failed, lock;
    int64_t items; /* rows of batch_items.npy */
    /* Of a run that keeps every step, whose optimizer has a state: a row of resume_state.npy; the step whose state it
     * has that is not in the file yet, 0: none; the file's descriptor + 1; the row to write next. */
    double *resume_state;
    size_t resume_step;
    int resume_file;
    size_t resume_place;
    void *row;       /* P numbers of the file's type, where that is not pk_real */
    double *states;  /* V P numbers, where k > 1 */
    double *uniform; /* weights of a batch that was given without, grows */
    size_t uniform_size;
} pk_recorder;

/* Starts a recording: makes the directory (not its parents), writes the training data, w_0 =
 * initial_weights (P) and last the manifest. Refuses a directory that already holds a file of a run.
 *
 * With options->resume and a run there: checks that it is the same one (network, loss, optimizer, types,
 * optional files, keep_every, training data, w_0; initial_weights may be NULL to skip the last), cuts off what
 * a step in flight left behind, and appends after step recorder->steps; pk_replay_weights gives the weights to
 * go on from. A directory without run.txt (a start that was interrupted) is started anew.
 *
 * One recorder at a time: a second one on the same directory is refused (advisory lock).
 * PK_IO, PK_ARGUMENT, PK_SHAPE, PK_FORMAT, PK_NOT_FINITE, PK_MEMORY, PK_MEMORY_LIMIT; *recorder is
 * untouched then. */
PK_API PK__MUST_USE pk_status pk_recorder_open(pk_context *context, const char *directory,
                                               const pk_recorder_options *options, const pk_dataset *train,
                                               const pk_real *initial_weights, pk_recorder *recorder);

/* Appends one step: w_{s+1} = weights_after (P) came from w_s by this rate on this batch, whose gradient was
 * multiplied by gradient_scale (1 without clipping). batch->weights: NULL for 1/count; must be NULL unless
 * batch_weights are recorded. gradient_scale must be 1 unless recorded. second_moments (P): given exactly if
 * recorded. Cost: one write(2) for each file. Other processes can read the step when this returns PK_OK, though the operating
 * system may not have written it to the disk yet; on an argument error or PK_NOT_FINITE nothing was written. After PK_IO (a full
 * disk, say) the run stays readable up to the step before, and this recorder accepts no further steps.
 * With keep_every: PK_ARGUMENT; only the library's own steps can be replayed (pk_recorder_training_step). */
PK_API PK__MUST_USE pk_status pk_recorder_step(pk_context *context, pk_recorder *recorder, double learning_rate,
                                               const pk_batch *batch, double gradient_scale,
                                               const pk_real *second_moments, const pk_real *weights_after);

/* The rates of the groups at the next step, one a group line; of a recording with options->group_rates. PK_ARGUMENT,
 * PK_NOT_FINITE. */
PK_API PK__MUST_USE pk_status pk_recorder_group_rates(pk_context *context, pk_recorder *recorder,
                                                      const double *rates);

/* The same for a step that pk_training_step (revisit.h) made, with any keep_every. state: the optimizer's vectors
 * after the step (V P numbers; NULL where it has none); second moments are taken from it. With keep_every, a
 * step costs its small rows, a hash of the weights, and at every k-th step the two long rows. */
PK_API PK__MUST_USE pk_status pk_recorder_training_step(pk_context *context, pk_recorder *recorder,
                                                        double learning_rate, const pk_batch *batch,
                                                        double gradient_scale, const pk_real *state,
                                                        const pk_real *weights_after);

/* The smallest k with which the weights of a run of `steps` steps in float64, and the optimizer's state_vectors
 * (pk_optimizer_state_vectors) that k > 1 keeps beside them, take at most `bytes` on disk; batches and rates come
 * on top. 0 where w_0 alone takes more. */
PK_API size_t pk_recorder_choose_keep_every(size_t parameters, size_t steps, size_t state_vectors,
                                            uint64_t bytes);

/* Brings the headers up to date and closes the files; *recorder is zeroed, whatever is returned. A zeroed
 * recorder is allowed. PK_IO. */
PK_API PK__MUST_USE pk_status pk_recorder_close(pk_context *context, pk_recorder *recorder);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_RECORD_IMPLEMENTED)
#define PATHKERNEL_RECORD_IMPLEMENTED
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

/* ---- recording ------------------------------------------------------------------------------------- */

/* The options of a recorder, parsed. */
typedef struct pk__recording {
    pk_graph graph;
    pk_criterion criterion;
    char *loss_text;
    pk_optimizer optimizer;
    char optimizer_text[256];
    pk_parameter_groups groups;
    char *groups_text;
    size_t keep_every;
    const pk_real *initial_state; /* the caller's, or NULL */
    int present[PK__RUN_FILES];
    int exists; /* the directory holds a manifest */
    int made;   /* the directory is new */
} pk__recording;

static pk_status pk__recording_parse(pk_context *context, const pk_recorder_options *options,
                                     const pk_dataset *train, pk__recording *recording)
{
    pk_status status = pk_criterion_parse(context, options->loss, &recording->criterion);
    const size_t loss_size = !status ? pk_criterion_format(&recording->criterion, NULL, 0) : 0;
    if (!status)
        status = pk_allocate(context, loss_size, 1, "the text of the loss", &recording->loss_text);
    if (!status)
        (void)pk_criterion_format(&recording->criterion, recording->loss_text, loss_size);
    if (!status)
        status =
            pk_optimizer_parse(context, options->optimizer ? options->optimizer : "sgd", &recording->optimizer);
    if (!status)
        status = pk_optimizer_format(&recording->optimizer, recording->optimizer_text,
                                     sizeof recording->optimizer_text);
    recording->optimizer.initial_step = options->initial_step;
    recording->optimizer.initial_state = options->initial_state != NULL;
    recording->initial_state = options->initial_state;
    if (!status && options->initial_step > PK_KEEP_EVERY_MOST)
        status = pk__fail(context, PK_ARGUMENT, "initial_step %zu is more than %d", options->initial_step,
                          (int)PK_KEEP_EVERY_MOST);
    if (!status)
        status = pk_network_parse_with(context, options->network, options->constants, &recording->graph);
    if (!status)
        status = pk_parameter_groups_parse(context, &recording->graph, &recording->optimizer,
                                           options->group_count, options->groups, &recording->groups);
    if (!status)
        status = pk_allocate(context, pk__groups_text_size(&recording->groups), 1, "the text of the groups",
                             &recording->groups_text);
    if (status)
        return status;
    pk__groups_text(&recording->optimizer, &recording->groups, recording->groups_text,
                    pk__groups_text_size(&recording->groups));
    if (options->group_rates && !recording->groups.count)
        return pk__fail(context, PK_ARGUMENT, "group_rates without groups");
    for (size_t g = 0; g < recording->groups.count; g++) {
        const pk_parameter_group *group = &recording->groups.group[g];
        if (options->group_rates ? group->rated : !group->keys && !group->frozen)
            return pk__fail(context, PK_ARGUMENT, "group %zu: %s", g,
                            options->group_rates ? "rate= beside group_rates, which are the rates themselves"
                                                 : "it has no key, and no group_rates are recorded");
    }
    const int has_state = pk_parameter_groups_state_vectors(&recording->optimizer, &recording->groups) > 0;
    if (options->initial_state && !has_state)
        return pk__fail(context, PK_ARGUMENT, "initial_state: the optimizer '%.80s' has no state",
                        recording->optimizer_text);
    if (!options->initial_state && options->initial_step && has_state)
        return pk__fail(context, PK_ARGUMENT, "initial_step %zu without initial_state", options->initial_step);
    recording->keep_every = options->keep_every ? options->keep_every : 1;
    if (recording->keep_every > PK_KEEP_EVERY_MOST)
        return pk__fail(context, PK_ARGUMENT, "keep_every %zu is more than %d", recording->keep_every,
                        (int)PK_KEEP_EVERY_MOST);
    if (recording->keep_every > 1 && options->float32 && sizeof(pk_real) > sizeof(float))
        return pk__fail(context, PK_ARGUMENT, "keep_every: steps cannot be replayed from weights in float32");
    if (options->second_moments && recording->optimizer.kind != PK_SGD &&
        pk__groups_moments(&recording->optimizer, &recording->groups) == SIZE_MAX)
        return pk__fail(context, PK_ARGUMENT, "second moments: %s", pk__no_moments(&recording->optimizer));
    if (recording->keep_every > 1 && options->second_moments)
        return pk__fail(context, PK_ARGUMENT, "keep_every: second moments are kept with the optimizer's state");
    for (int f = 0; f < PK__RUN_FILES; f++)
        recording->present[f] =
            pk__run_has(f, recording->keep_every, &recording->optimizer, &recording->groups) > 0;
    recording->present[PK__RUN_ITEM_WEIGHTS] = options->batch_weights != 0;
    recording->present[PK__RUN_GROUP_RATES] = options->group_rates != 0;
    recording->present[PK__RUN_SCALES] = options->gradient_scales != 0;
    recording->present[PK__RUN_MOMENTS] = options->second_moments != 0;
    return pk__run_check_data(context, train, &recording->graph, &recording->criterion);
}

/* Parameters of numbers as the file's type, in recorder->row where they have to be converted; the caller
 * has checked that they fit. */
static const void *pk__recorder_row(const pk_recorder *recorder, const pk_real *numbers)
{
    if (!recorder->row)
        return numbers;
    for (size_t p = 0; p < recorder->parameters; p++)
        if (recorder->float32)
            ((float *)recorder->row)[p] = (float)numbers[p];
        else
            ((double *)recorder->row)[p] = (double)numbers[p];
    return recorder->row;
}

/* Whether P numbers are finite as the file's type. */
static pk_status pk__recorder_finite(pk_context *context, const pk_recorder *recorder, const char *what,
                                     const pk_real *numbers)
{
    const double limit = recorder->float32 ? FLT_MAX : DBL_MAX;
    if ((!recorder->float32 || sizeof(pk_real) == sizeof(float)) &&
        pk__all_finite(numbers, recorder->parameters))
        return PK_OK;
    for (size_t p = 0; p < recorder->parameters; p++)
        if (!(fabs((double)numbers[p]) <= limit))
            return pk__fail(context, PK_NOT_FINITE, "%s: parameter %zu is %g after step %zu, not a finite %s",
                            what, p, (double)numbers[p], recorder->steps,
                            recorder->float32 ? "float32" : "float64");
    return PK_OK;
}

/* train_inputs.npy or train_targets.npy, of the types that every reader of a run knows: bytes become numbers, labels and
 * other integers int64. */
static pk_status pk__recorder_data(pk_context *context, const char *path, const pk_array *array)
{
    if (!pk_type_is_integer(array->type) || array->type == PK_INT64)
        return pk_array_write(context, path, array->type, array->rank, array->shape, array->data);
    const int bytes = array->type == PK_UINT8 && !pk__is_labels(array);
    pk_array_writer writer;
    memset(&writer, 0, sizeof writer);
    void *row = NULL;
    pk_status status = pk_allocate(context, array->row_items, sizeof(int64_t), "a row of training data", &row);
    if (!status)
        status = pk_array_create(context, path, bytes ? PK__REAL_TYPE : PK_INT64, array->rank, array->shape + 1,
                                 &writer);
    for (size_t i = 0; i < pk_array_length(array) && !status; i++) {
        if (bytes)
            pk_array_reals(array, i * array->row_items, array->row_items, (pk_real *)row);
        else
            pk_array_integers(array, i * array->row_items, array->row_items, (int64_t *)row);
        status = pk_array_append(context, &writer, 1, row);
    }
    pk_release(context, row);
    pk_status closed = pk_array_close(status ? NULL : context, &writer); /* keeps the first message */
    return status ? status : closed;
}

enum { PK__RESUME_EVERY = 16, PK__RESUME_HEAD = 2 };
#define PK__RESUME_FILE "resume_state.npy"

/* A step and 53 bits of a hash, as numbers that a double represents exactly. */
static void pk__resume_head(size_t step, const pk_real *weights, size_t parameters, const pk_real *state,
                            size_t count, double head[PK__RESUME_HEAD])
{
    uint64_t hash = (uint64_t)pk__checksum(weights, parameters, state, count);
    head[0] = (double)step;
    head[1] = (double)(hash >> 11);
}

/* Opens resume_state.npy for overwriting. Its states are kept if it is a valid file of that kind. */
static int pk__recorder_open_state(const pk_recorder *recorder, const unsigned char *header, size_t room,
                                   size_t bytes)
{
    const off_t size = (off_t)(room + 2 * bytes);
    unsigned char there[PK__NPY_ROOM];
    struct stat about;
    const char *kind;
    int file = pk__open_regular(recorder->lock - 1, PK__RESUME_FILE, O_RDWR | O_CREAT, &kind);
    if (file < 0)
        return -1;
    int good = fstat(file, &about) == 0;
    if (good && (about.st_size != size || pread(file, there, room, 0) != (ssize_t)room ||
                 memcmp(there, header, room) != 0))
        good = ftruncate(file, 0) == 0 && pk__file_reserve(file, (size_t)size) == 0 &&
               pk__write_at(file, header, room, 0);
    if (good)
        return file;
    close(file);
    return -1;
}

/* Overwrites the older of the two states in the file, so that the other one stays complete meanwhile. A failure is no error:
 * the steps themselves are recorded. */
static void pk__recorder_write_state(pk_recorder *recorder)
{
    const size_t shape[2] = {2, PK__RESUME_HEAD + recorder->state_numbers}, bytes = shape[1] * sizeof(double);
    unsigned char header[PK__NPY_ROOM];
    const pk_array array = pk_array_view(PK_FLOAT64, 2, shape, recorder->resume_state);
    const size_t room = pk__npy_header(&array, 0, 0, header);
    if (!recorder->resume_file)
        recorder->resume_file = pk__recorder_open_state(recorder, header, room, bytes) + 1;
    if (recorder->resume_file && pk__write_at(recorder->resume_file - 1, recorder->resume_state, bytes,
                                              room + recorder->resume_place * bytes))
        recorder->resume_place = !recorder->resume_place;
}

/* Keeps the optimizer's state after `steps` steps, once in `every` steps; these steps are complete in the recording. */
PK__PRIVATE void pk__recorder_keep_state(pk_recorder *recorder, size_t steps, size_t every,
                                         const pk_real *state, const pk_real *weights)
{
    if (!recorder->resume_state || !state)
        return;
    if (recorder->resume_step && steps == recorder->resume_step + 1)
        pk__recorder_write_state(recorder);
    recorder->resume_step = 0;
    if (steps % every)
        return;
    recorder->resume_step = steps;
    pk__resume_head(steps, weights, recorder->parameters, state, recorder->state_numbers,
                    recorder->resume_state);
    for (size_t i = 0; i < recorder->state_numbers; i++)
        recorder->resume_state[PK__RESUME_HEAD + i] = (double)state[i];
}

/* Reads from resume_state.npy the state (V P) of the latest step before the last, and sets *step; SIZE_MAX if there is none.
 * weights (P): working memory. */
PK__PRIVATE pk_status pk__recorder_find_state(pk_context *context, const char *directory, const pk_run *run,
                                              pk_recorder *recorder, pk_real *weights, pk_real *state,
                                              size_t *step)
{
    const size_t numbers = recorder->state_numbers, row = PK__RESUME_HEAD + numbers;
    pk__run_path path;
    pk_array array;
    memset(&path, 0, sizeof path);
    memset(&array, 0, sizeof array);
    *step = SIZE_MAX;
    pk_status status = pk__run_path_take(context, directory, &path);
    if (status)
        return status;
    /* Without a context: it is no error that there is no such file, or another one. */
    if (pk_array_map(NULL, pk__run_path_of(&path, PK__RESUME_FILE), 0, &array) == PK_OK &&
        array.type == PK_FLOAT64 && array.rank == 2 && array.shape[0] == 2 && array.shape[1] == row) {
        double head[2][PK__RESUME_HEAD], own[PK__RESUME_HEAD] = {0, 0};
        for (size_t i = 0; i < 2; i++)
            memcpy(head[i], (const double *)array.data + i * row, sizeof head[i]);
        size_t place = head[1][0] > head[0][0];
        for (int tries = 0; tries < 2 && *step == SIZE_MAX; tries++, place = !place) {
            if (!(head[place][0] >= 1 && head[place][0] < (double)run->steps))
                continue;
            const size_t there = (size_t)head[place][0];
            pk_array_reals(&array, place * row + PK__RESUME_HEAD, numbers, state);
            if (pk_run_weights(NULL, run, there, weights) == PK_OK)
                pk__resume_head(there, weights, run->parameters, state, numbers, own);
            if (memcmp(head[place], own, sizeof own) == 0) {
                *step = there;
                recorder->resume_place = !place;
            }
        }
    }
    pk_array_release(NULL, &array);
    pk_release(context, path.text);
    return PK_OK;
}

/* Writes run.txt into the directory `folder`; after a crash it is complete or absent. */
static pk_status pk__recorder_manifest(pk_context *context, int folder, const char *directory,
                                       const pk__recording *recording)
{
    char *text = NULL;
    size_t size = strlen(recording->graph.text) + sizeof recording->optimizer_text +
                  strlen(recording->groups_text) + strlen(recording->loss_text) + 256,
           at = 0;
    char keep[80] = "";
    if (recording->keep_every > 1)
        snprintf(keep, sizeof keep, "keep_every %zu\n", recording->keep_every);
    if (recording->optimizer.initial_state || recording->optimizer.initial_step)
        snprintf(keep + strlen(keep), sizeof keep - strlen(keep), "initial_step %zu\n",
                 recording->optimizer.initial_step);
    pk_status status = pk_allocate(context, size, 1, "the text of run.txt", &text);
    if (status)
        return status;
    size = (size_t)snprintf(text, size, "pathkernel-run 1\nnetwork   %s\nloss      %s\noptimizer %s\n%s%s",
                            recording->graph.text, recording->loss_text, recording->optimizer_text,
                            recording->groups_text, keep);
    const char *kind;
    int file = pk__open_regular(folder, "run.txt.tmp", O_WRONLY | O_CREAT, &kind);
    int failed = file < 0 || ftruncate(file, 0) != 0;
    while (!failed && at < size) {
        ssize_t count = write(file, text + at, size - at);
        if (count >= 0)
            at += (size_t)count;
        else
            failed = errno != EINTR;
    }
    /* The text is on the disk before the file gets its name, and then the name is: a power cut leaves all of it or nothing. */
    failed = failed || fsync(file) != 0 || renameat(folder, "run.txt.tmp", folder, "run.txt") != 0;
    if (failed)
        status = pk__fail(context, PK_IO, "%s/run.txt: %s%s", directory, kind ? "run.txt.tmp is " : "",
                          kind ? kind : strerror(errno));
    else
        (void)fsync(folder);
    if (file >= 0)
        close(file);
    pk_release(context, text);
    return status;
}

/* Undoes a start that failed. */
static void pk__recorder_clear(int folder)
{
    for (int f = 0; f < PK__RUN_FILES + PK__RUN_FIXED; f++) {
        const char *name = f < PK__RUN_FILES ? pk__run_files[f].name : pk__run_fixed[f - PK__RUN_FILES];
        char unfinished[64];
        snprintf(unfinished, sizeof unfinished, "%s.tmp", name);
        (void)unlinkat(folder, name, 0);
        (void)unlinkat(folder, unfinished, 0);
    }
    (void)unlinkat(folder, PK__RESUME_FILE, 0);
}

/* Makes the directory if it is missing, locks it, and determines whether it has a run. */
static pk_status pk__recorder_folder(pk_context *context, pk__run_path *path, int resume, int replace,
                                     pk_recorder *recorder, pk__recording *recording)
{
    if (mkdir(path->directory, 0777) == 0)
        recording->made = 1;
    else if (errno != EEXIST)
        return pk__run_io(context, path->directory);
    int folder = pk__open_above(AT_FDCWD, path->directory, O_RDONLY | O_DIRECTORY);
    if (folder < 0)
        return pk__run_io(context, path->directory);
    recorder->lock = folder + 1;
    /* A file system without locks is used without them. */
    if (flock(folder, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return pk__fail(context, PK_IO, "%s is being recorded by another recorder", path->directory);
    if (replace) { /* the manifest first: without it the rest is no run */
        (void)unlinkat(folder, pk__run_fixed[PK__RUN_MANIFEST], 0);
        pk__recorder_clear(folder);
    }
    struct stat about; /* a link to nowhere is there, too */
    recording->exists = fstatat(folder, pk__run_fixed[PK__RUN_MANIFEST], &about, AT_SYMLINK_NOFOLLOW) == 0;
    if (recording->exists && !resume)
        return pk__fail(context, PK_ARGUMENT,
                        "%s holds a run already: resume or replace it, or record elsewhere", path->directory);
    for (int f = 0; f < PK__RUN_FILES + PK__RUN_FIXED && !resume; f++) {
        const char *name = f < PK__RUN_FILES ? pk__run_files[f].name : pk__run_fixed[f - PK__RUN_FILES];
        if (fstatat(folder, name, &about, AT_SYMLINK_NOFOLLOW) == 0)
            return pk__fail(context, PK_ARGUMENT, "%s exists already: record elsewhere",
                            pk__run_path_of(path, name));
    }
    return PK_OK;
}

_Static_assert(sizeof ((pk_recorder *)0)->present / sizeof(int) == PK__RUN_FILES, "one writer a file");

static pk_type pk__recorder_type(const pk_recorder *recorder, int file)
{
    return pk__run_files[file].type ? pk__run_files[file].type : recorder->float32 ? PK_FLOAT32 : PK_FLOAT64;
}

/* Numbers in a row of a file of rank 2. */
static const size_t *pk__recorder_width(const pk_recorder *recorder, int file)
{
    return file == PK__RUN_STATES        ? &recorder->state_numbers
           : file == PK__RUN_GROUP_RATES ? &recorder->group_count
                                         : &recorder->parameters;
}

/* The optimizer's state as float64. */
static const double *pk__recorder_state(pk_recorder *recorder, const pk_real *state)
{
    for (size_t i = 0; i < recorder->state_numbers; i++)
        recorder->states[i] = (double)state[i];
    return recorder->states;
}

/* Writes what a run with keep_every > 1 has for step 0 besides w_0: a checksum, and the optimizer's vectors, zero unless there is
 * a state to begin with. */
static pk_status pk__recorder_first(pk_context *context, pk_recorder *recorder, const pk_real *initial,
                                    const pk_real *initial_state)
{
    int64_t checksum = pk__checksum(initial, recorder->parameters, NULL, 0);
    if (recorder->state_numbers) {
        pk_real *state = NULL;
        pk_status status =
            pk_allocate(context, recorder->state_numbers, sizeof *state, "the optimizer's first state", &state);
        if (!status) {
            if (initial_state)
                memcpy(state, initial_state, recorder->state_numbers * sizeof *state);
            checksum = pk__checksum(initial, recorder->parameters, state, recorder->state_numbers);
            status = pk_array_append(context, &recorder->files[PK__RUN_STATES], 1,
                                     pk__recorder_state(recorder, state));
        }
        pk_release(context, state);
        if (status)
            return status;
    }
    return pk_array_append(context, &recorder->files[PK__RUN_CHECKSUMS], 1, &checksum);
}

/* Writes initial_state.npy. */
static pk_status pk__recorder_initial(pk_context *context, pk__run_path *path, const pk__recording *recording)
{
    const size_t shape[2] = {pk_parameter_groups_state_vectors(&recording->optimizer, &recording->groups),
                             recording->graph.parameters};
    if (!recording->initial_state)
        return PK_OK;
    double *numbers = NULL;
    const size_t count = shape[0] * shape[1];
    pk_status status = pk_allocate(context, count, sizeof *numbers, "the state to begin with", &numbers);
    for (size_t i = 0; !status && i < count; i++) {
        numbers[i] = (double)recording->initial_state[i];
        if (!isfinite(numbers[i]))
            status = pk__fail(context, PK_NOT_FINITE, "initial_state: number %zu of vector %zu is %g",
                              i % shape[1], i / shape[1], numbers[i]);
    }
    if (!status)
        status = pk_array_write(context, pk__run_path_of(path, pk__run_fixed[PK__RUN_INITIAL]), PK_FLOAT64, 2,
                                shape, numbers);
    pk_release(context, numbers);
    return status;
}

static pk_status pk__recorder_start(pk_context *context, pk__run_path *path, const pk__recording *recording,
                                    const pk_dataset *train, const pk_real *initial, pk_recorder *recorder)
{
    const pk_array *data[2] = {&train->inputs, &train->targets};
    pk_status status = PK_OK;
    for (int k = 0; k < 2 && !status; k++)
        status = pk__recorder_data(context, pk__run_path_of(path, pk__run_fixed[k]), data[k]);
    if (!status)
        status = pk__recorder_initial(context, path, recording);
    pk_array constant;
    const pk_node *node = NULL;
    while (!status && (node = pk_graph_named(&recording->graph, node, &constant)) != NULL) {
        char file[PK__CONSTANT_FILE];
        status = pk__recorder_data(context, pk__run_path_of(path, pk__constant_file(node->constant_name, file)),
                                   &constant);
    }
    for (int f = 0; f < PK__RUN_FILES && !status; f++)
        if (recording->present[f])
            status = pk_array_create(context, pk__run_path_of(path, pk__run_files[f].name),
                                     pk__recorder_type(recorder, f), pk__run_files[f].rank,
                                     pk__recorder_width(recorder, f), &recorder->files[f]);
    int64_t zero = 0;
    if (!status)
        status = pk_array_append(context, &recorder->files[PK__RUN_OFFSETS], 1, &zero);
    if (!status && recorder->present[PK__RUN_CHECKSUMS])
        status = pk__recorder_first(context, recorder, initial, recording->initial_state);
    if (!status)
        status =
            pk_array_append(context, &recorder->files[PK__RUN_WEIGHTS], 1, pk__recorder_row(recorder, initial));
    if (!status)
        status = pk__recorder_manifest(context, recorder->lock - 1, path->directory, recording);
    return status;
}

/* Whether the training data are those of the run. */
static int pk__same_data(const pk_array *given, const pk_array *recorded)
{
    if (given->rank != recorded->rank)
        return 0;
    for (int d = 0; d < given->rank; d++)
        if (given->shape[d] != recorded->shape[d])
            return 0;
    size_t items = pk_array_items(given);
    if (given->type == recorded->type)
        return memcmp(given->data, recorded->data, items * pk_type_size(given->type)) == 0;
    if (!pk_type_is_integer(given->type)) /* only integers are recorded as another type */
        return 0;
    for (size_t i = 0; i < items; i++) {
        int64_t here, there;
        pk_real number;
        pk_array_integers(given, i, 1, &here);
        pk_array_reals(recorded, i, 1, &number);
        int same = number == (pk_real)here;
        if (pk_type_is_integer(recorded->type)) {
            pk_array_integers(recorded, i, 1, &there);
            same = here == there;
        }
        if (!same)
            return 0;
    }
    return 1;
}

/* Whether the run is the one that would have been recorded. */
static pk_status pk__recorder_compare(pk_context *context, const char *directory,
                                      const pk__recording *recording, const pk_dataset *train,
                                      const pk_real *initial, const pk_recorder *recorder, pk_run *run)
{
    char optimizer[256], *loss = NULL;
    pk_status status = pk_optimizer_format(&run->optimizer, optimizer, sizeof optimizer);
    if (status)
        return pk__fail(context, status, "%s/run.txt: the optimizer cannot be written", directory);
    const size_t loss_size = pk_criterion_format(&run->criterion, NULL, 0);
    status = pk_allocate(context, loss_size, 1, "the text of the loss", &loss);
    if (status)
        return status;
    (void)pk_criterion_format(&run->criterion, loss, loss_size);
    const char *line[3][3] = {{"network", run->graph.text, recording->graph.text},
                              {"loss", loss, recording->loss_text},
                              {"optimizer", optimizer, recording->optimizer_text}};
    for (int k = 0; k < 3 && !status; k++)
        if (strcmp(line[k][1], line[k][2]) != 0)
            status = pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its %s is '%.120s', not '%.120s'",
                              directory, line[k][0], line[k][1], line[k][2]);
    pk_release(context, loss);
    if (status)
        return status;
    char *groups = NULL;
    status = pk_allocate(context, pk__groups_text_size(&run->groups), 1, "the text of the groups", &groups);
    if (status)
        return status;
    pk__groups_text(&run->optimizer, &run->groups, groups, pk__groups_text_size(&run->groups));
    const int same_groups = strcmp(groups, recording->groups_text) == 0;
    pk_release(context, groups);
    if (!same_groups)
        return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its parameter groups are others",
                        directory);
    if (run->keep_every != recording->keep_every)
        return pk__fail(context, PK_ARGUMENT,
                        "%s cannot be resumed: it keeps every %zuth step, not every %zuth", directory,
                        run->keep_every, recording->keep_every);
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array(run, f);
        if (!array->data != !recording->present[f])
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: it was recorded %s %s", directory,
                            array->data ? "with" : "without", pk__run_files[f].name);
        if (array->data && array->type != pk__recorder_type(recorder, f))
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: %s holds %s, not %s", directory,
                            pk__run_files[f].name, pk_type_name(array->type),
                            pk_type_name(pk__recorder_type(recorder, f)));
    }
    if (run->optimizer.initial_state != recording->optimizer.initial_state ||
        run->optimizer.initial_step != recording->optimizer.initial_step)
        return pk__fail(context, PK_ARGUMENT,
                        "%s cannot be resumed: it begins %s a state of the optimizer, after %zu updates",
                        directory, run->optimizer.initial_state ? "with" : "without",
                        run->optimizer.initial_step);
    for (size_t i = 0; recording->initial_state && i < pk_array_items(&run->initial_state); i++) {
        pk_real there;
        pk_array_reals(&run->initial_state, i, 1, &there);
        if (there != recording->initial_state[i])
            return pk__fail(context, PK_ARGUMENT,
                            "%s cannot be resumed: it begins with another state of the optimizer", directory);
    }
    const pk_array *given[2] = {&train->inputs, &train->targets};
    const pk_array *recorded[2] = {&run->train.inputs, &run->train.targets};
    for (int k = 0; k < 2; k++)
        if (!pk__same_data(given[k], recorded[k]))
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: %s holds other data", directory,
                            pk__run_fixed[k]);
    pk_array own, other;
    const pk_node *node = NULL, *wanted = NULL; /* the same network: the same nodes */
    while ((node = pk_graph_named(&run->graph, node, &own)) != NULL) {
        wanted = pk_graph_named(&recording->graph, wanted, &other);
        if (!wanted || !pk__same_data(&other, &own))
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its array '%s' holds other numbers",
                            directory, node->constant_name);
    }
    for (size_t p = 0; initial && p < run->parameters; p++) {
        pk_real there, here = recorder->float32 ? (pk_real)(float)initial[p] : initial[p];
        pk_array_reals(&run->weights, p, 1, &there);
        if (there != here)
            return pk__fail(
                context, PK_ARGUMENT,
                "%s cannot be resumed: it starts from other weights, parameter %zu is %.17g, not %.17g",
                directory, p, (double)there, (double)here);
    }
    return PK_OK;
}

static pk_status pk__recorder_continue(pk_context *context, pk__run_path *path, const pk__recording *recording,
                                       const pk_dataset *train, const pk_real *initial, pk_recorder *recorder)
{
    pk_run run;
    pk_status status = pk_run_open(context, path->directory, &run);
    if (status)
        return status;
    status = pk__recorder_compare(context, path->directory, recording, train, initial, recorder, &run);
    recorder->steps = run.steps;
    recorder->items = run.batch_offsets[run.steps];
    pk_run_release(context, &run); /* before files shrink */
    /* Files are truncated in the reverse order of writing, so that a kill in between leaves what a kill while recording does. */
    for (int f = PK__RUN_FILES - 1; f >= 0 && !status; f--) {
        size_t rows = pk__run_files[f].per_item ? (size_t)recorder->items
                      : pk__run_files[f].kept ? recorder->steps / recorder->keep_every
                                              : recorder->steps;
        if (recording->present[f])
            status = pk_array_reopen(context, pk__run_path_of(path, pk__run_files[f].name),
                                     pk__recorder_type(recorder, f), pk__run_files[f].rank,
                                     pk__recorder_width(recorder, f), rows + pk__run_files[f].before,
                                     &recorder->files[f]);
    }
    return status;
}

/* Closes; errors go to report only: NULL keeps the message of an earlier error. */
PK__PRIVATE pk_status pk__recorder_end(pk_context *context, pk_context *report, pk_recorder *recorder)
{
    pk_status first = PK_OK;
    for (int f = 0; f < PK__RUN_FILES; f++) {
        pk_status status = pk_array_close(first ? NULL : report, &recorder->files[f]);
        if (!first)
            first = status;
    }
    pk_release(context, recorder->row);
    pk_release(context, recorder->states);
    pk_release(context, recorder->resume_state);
    if (recorder->resume_file)
        close(recorder->resume_file - 1);
    pk_release(context, recorder->uniform);
    pk_release(context, recorder->group_rates);
    if (recorder->lock)
        close(recorder->lock - 1);
    memset(recorder, 0, sizeof *recorder);
    return first;
}

/* What a recorder needs of its recording, and memory for its rows. */
static pk_status pk__recorder_prepare(pk_context *context, const pk__recording *recording,
                                      const pk_real *initial_weights, pk_recorder *opened)
{
    pk_status status = PK_OK;
    opened->parameters = recording->graph.parameters;
    memcpy(opened->present, recording->present, sizeof opened->present);
    opened->keep_every = recording->keep_every;
    opened->group_count = recording->groups.count;
    opened->moments = pk__groups_moments(&recording->optimizer, &recording->groups);
    if (!pk__multiply(pk_parameter_groups_state_vectors(&recording->optimizer, &recording->groups),
                      opened->parameters, &opened->state_numbers) ||
        opened->state_numbers > SIZE_MAX - PK__RESUME_HEAD)
        return pk__fail(context, PK_OVERFLOW, "the optimizer's state overflows");
    if (initial_weights)
        status = pk__recorder_finite(context, opened, "initial weights", initial_weights);
    if (!status && pk__recorder_type(opened, PK__RUN_WEIGHTS) != PK__REAL_TYPE)
        status = pk_allocate(context, opened->parameters, opened->float32 ? sizeof(float) : sizeof(double),
                             "a row of weights", &opened->row);
    if (!status && opened->present[PK__RUN_GROUP_RATES])
        status = pk_allocate(context, opened->group_count, sizeof *opened->group_rates, "the rates of groups",
                             &opened->group_rates);
    if (!status && opened->present[PK__RUN_STATES])
        status = pk_allocate(context, opened->state_numbers, sizeof *opened->states,
                             "a row of optimizer states", &opened->states);
    if (!status && opened->keep_every == 1 && opened->state_numbers &&
        !(opened->float32 && sizeof(pk_real) > sizeof(float)))
        status = pk_allocate(context, PK__RESUME_HEAD + opened->state_numbers, sizeof *opened->resume_state,
                             "the state to resume from", &opened->resume_state);
    if (status)
        return status;
    for (size_t g = 0; opened->group_rates && g < opened->group_count; g++)
        opened->group_rates[g] = (double)NAN; /* until they are given */
    return PK_OK;
}

/* Opens the run that is there, or makes one. */
static pk_status pk__recorder_begin(pk_context *context, pk__run_path *path, const pk_recorder_options *options,
                                    const pk_dataset *train, const pk_real *initial_weights,
                                    pk__recording *recording, pk_recorder *opened)
{
    pk_status status = pk__recorder_folder(context, path, options->resume, options->replace, opened, recording);
    if (status)
        return status;
    if (recording->exists)
        return pk__recorder_continue(context, path, recording, train, initial_weights, opened);
    status = initial_weights
                 ? pk__recorder_start(context, path, recording, train, initial_weights, opened)
                 : pk__fail(context, PK_ARGUMENT, "%s: there is no run to resume, and no initial weights",
                            path->directory);
    if (status)
        pk__recorder_clear(opened->lock - 1);
    return status;
}

PK_API pk_status pk_recorder_open(pk_context *context, const char *directory,
                                  const pk_recorder_options *options, const pk_dataset *train,
                                  const pk_real *initial_weights, pk_recorder *recorder)
{
    const char *missing = !directory                                              ? "directory"
                          : !options || !options->network || !options->loss       ? "options, network or loss"
                          : !train || !train->inputs.data || !train->targets.data ? "training data"
                          : !initial_weights && !options->resume                  ? "initial_weights"
                          : !recorder                                             ? "recorder"
                                                                                  : NULL;
    if (missing)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_open: %s missing (NULL)", missing);
    if (options->resume && options->replace)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_open: a run cannot be both resumed and replaced");
    pk__recording recording;
    pk_recorder opened;
    pk__run_path path;
    memset(&recording, 0, sizeof recording);
    memset(&opened, 0, sizeof opened);
    memset(&path, 0, sizeof path);
    opened.float32 = options->float32 != 0;
    opened.examples = pk_dataset_examples(train);
    pk_status status = pk__recording_parse(context, options, train, &recording);
    if (!status)
        status = pk__recorder_prepare(context, &recording, initial_weights, &opened);
    if (!status)
        status = pk__run_path_take(context, directory, &path);
    if (!status)
        status = pk__recorder_begin(context, &path, options, train, initial_weights, &recording, &opened);
    if (status && recording.made)
        (void)rmdir(directory);
    pk_release(context, path.text);
    pk_parameter_groups_release(context, &recording.groups);
    pk_release(context, recording.groups_text);
    pk_release(context, recording.loss_text);
    pk_criterion_release(context, &recording.criterion);
    pk_graph_release(context, &recording.graph);
    if (!status) {
        *recorder = opened;
        return PK_OK;
    }
    (void)pk__recorder_end(context, NULL, &opened);
    return status;
}

/* Checks everything about a step, before anything of it is written. */
static pk_status pk__recorder_check(pk_context *context, const pk_recorder *recorder, double learning_rate,
                                    const pk_batch *batch, double gradient_scale, const pk_real *second_moments,
                                    const pk_real *state, const pk_real *weights_after)
{
    size_t step = recorder->steps;
    if (!recorder->lock)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_step: the recorder is closed");
    if (recorder->failed)
        return pk__fail(context, PK_IO, "%s: a write failed at step %zu; resume the run with a new recorder",
                        recorder->files[PK__RUN_WEIGHTS].name, step);
    if (!batch || !batch->items || batch->count == 0 || !weights_after)
        return pk__fail(context, PK_ARGUMENT, "step %zu: an empty batch, or no weights", step);
    if (!isfinite(learning_rate) || !isfinite(gradient_scale))
        return pk__fail(context, PK_NOT_FINITE, "step %zu: the learning rate is %g, the gradient scale %g",
                        step, learning_rate, gradient_scale);
    if (gradient_scale != 1 && !recorder->present[PK__RUN_SCALES])
        return pk__fail(context, PK_ARGUMENT,
                        "step %zu: gradient scale %g, but gradient_scales are not recorded", step,
                        gradient_scale);
    for (size_t g = 0; recorder->group_rates && g < recorder->group_count; g++)
        if (!isfinite(recorder->group_rates[g]))
            return pk__fail(context, PK_ARGUMENT,
                            "step %zu: the rates of the groups are missing (pk_recorder_group_rates)", step);
    if (batch->weights && !recorder->present[PK__RUN_ITEM_WEIGHTS])
        return pk__fail(context, PK_ARGUMENT,
                        "step %zu: the batch has weights, but batch_weights are not recorded", step);
    if (!second_moments != !recorder->present[PK__RUN_MOMENTS])
        return pk__fail(context, PK_ARGUMENT, "step %zu: second moments are %s, but %s", step,
                        second_moments ? "given" : "missing", second_moments ? "not recorded" : "recorded");
    for (size_t b = 0; b < batch->count; b++)
        if (batch->items[b] < 0 || (uint64_t)batch->items[b] >= recorder->examples)
            return pk__fail(context, PK_ARGUMENT,
                            "step %zu: item %zu of the batch is %lld; there are %zu examples", step, b,
                            (long long)batch->items[b], recorder->examples);
    size_t bad = batch->weights ? pk__not_finite(batch->weights, batch->count) : batch->count;
    if (bad < batch->count)
        return pk__fail(context, PK_NOT_FINITE, "step %zu: weight %zu of the batch is %g", step, bad,
                        batch->weights[bad]);
    pk_status status = pk__recorder_finite(context, recorder, "weights", weights_after);
    if (!status && second_moments)
        status = pk__recorder_finite(context, recorder, "second moments", second_moments);
    if (!status && !state && recorder->present[PK__RUN_STATES])
        return pk__fail(context, PK_ARGUMENT, "step %zu: the optimizer's state is missing", step);
    if (!recorder->present[PK__RUN_STATES] || status || pk__all_finite(state, recorder->state_numbers))
        return status;
    for (size_t i = 0; i < recorder->state_numbers; i++)
        if (!isfinite(state[i]))
            return pk__fail(context, PK_NOT_FINITE, "the optimizer's state: number %zu is %g after step %zu", i,
                            (double)state[i], step);
    return status;
}

/* The weights of the batch's examples; 1/count each if batch->weights is NULL. */
static pk_status pk__recorder_batch_weights(pk_context *context, pk_recorder *recorder, const pk_batch *batch,
                                            const double **weights)
{
    *weights = batch->weights;
    if (batch->weights || !recorder->present[PK__RUN_ITEM_WEIGHTS])
        return PK_OK;
    if (recorder->uniform_size < batch->count) {
        double *more = NULL;
        pk_status status = pk_allocate(context, batch->count, sizeof *more, "the weights of a batch", &more);
        if (status)
            return status;
        pk_release(context, recorder->uniform);
        recorder->uniform = more;
        recorder->uniform_size = batch->count;
    }
    for (size_t b = 0; b < batch->count; b++)
        recorder->uniform[b] = 1 / (double)batch->count;
    *weights = recorder->uniform;
    return PK_OK;
}

/* Appends the rows of a step. state: the optimizer's vectors, recorded where steps are replayed. */
static pk_status pk__recorder_append(pk_context *context, pk_recorder *recorder, double learning_rate,
                                     const pk_batch *batch, double gradient_scale,
                                     const pk_real *second_moments, const pk_real *state,
                                     const pk_real *weights_after)
{
    const double *batch_weights = NULL;
    pk_status status = pk__recorder_check(context, recorder, learning_rate, batch, gradient_scale,
                                          second_moments, state, weights_after);
    if (!status)
        status = pk__recorder_batch_weights(context, recorder, batch, &batch_weights);
    if (status)
        return status;
    int64_t end = recorder->items + (int64_t)batch->count;
    int keeps = (recorder->steps + 1) % recorder->keep_every == 0;
    int64_t checksum =
        !recorder->present[PK__RUN_CHECKSUMS]
            ? 0
            : pk__checksum(weights_after, recorder->parameters, keeps ? state : NULL, recorder->state_numbers);
    const void *rows[PK__RUN_FILES] = {
        &learning_rate,        &end,      batch->items, batch_weights, &gradient_scale,
        recorder->group_rates, &checksum, NULL,         NULL,          NULL,
        NULL,                  NULL};
    for (int f = 0; f < PK__RUN_FILES && !status; f++) {
        if (!recorder->present[f] || (pk__run_files[f].kept && !keeps))
            continue;
        const void *row = f == PK__RUN_WEIGHTS   ? pk__recorder_row(recorder, weights_after)
                          : f == PK__RUN_MOMENTS ? pk__recorder_row(recorder, second_moments)
                          : f == PK__RUN_STATES  ? pk__recorder_state(recorder, state)
                                                 : rows[f];
        status = pk_array_append(context, &recorder->files[f],
                                 pk__run_files[f].per_item ? batch->count : 1, row);
    }
    if (status) {
        recorder->failed = 1; /* the files have different lengths now: readers see the step before */
        return status;
    }
    for (size_t g = 0; recorder->group_rates && g < recorder->group_count; g++)
        recorder->group_rates[g] = (double)NAN;
    recorder->items = end;
    recorder->steps++;
    pk__recorder_keep_state(recorder, recorder->steps, PK__RESUME_EVERY, state, weights_after);
    return PK_OK;
}

PK_API pk_status pk_recorder_step(pk_context *context, pk_recorder *recorder, double learning_rate,
                                  const pk_batch *batch, double gradient_scale, const pk_real *second_moments,
                                  const pk_real *weights_after)
{
    if (!recorder)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_step: recorder is NULL");
    if (recorder->present[PK__RUN_CHECKSUMS])
        return pk__fail(context, PK_ARGUMENT,
                        "keep_every: only steps of pk_training_step can be replayed; they are recorded by "
                        "pk_recorder_training_step");
    return pk__recorder_append(context, recorder, learning_rate, batch, gradient_scale, second_moments, NULL,
                               weights_after);
}

PK_API pk_status pk_recorder_group_rates(pk_context *context, pk_recorder *recorder, const double *rates)
{
    if (!recorder || !rates || !recorder->group_rates)
        return pk__fail(context, PK_ARGUMENT,
                        "pk_recorder_group_rates: recorder or rates are missing, or rates "
                        "of groups are not recorded");
    for (size_t g = 0; g < recorder->group_count; g++)
        if (!isfinite(rates[g]) || rates[g] < 0)
            return pk__fail(context, isfinite(rates[g]) ? PK_ARGUMENT : PK_NOT_FINITE,
                            "step %zu: the rate of group %zu is %g; it must be finite and >= 0",
                            recorder->steps, g, rates[g]);
    memcpy(recorder->group_rates, rates, recorder->group_count * sizeof *rates);
    return PK_OK;
}

PK_API pk_status pk_recorder_training_step(pk_context *context, pk_recorder *recorder, double learning_rate,
                                           const pk_batch *batch, double gradient_scale, const pk_real *state,
                                           const pk_real *weights_after)
{
    if (!recorder)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_training_step: recorder is NULL");
    const pk_real *moments = state && recorder->present[PK__RUN_MOMENTS] && recorder->moments != SIZE_MAX
                                 ? state + recorder->moments * recorder->parameters
                                 : NULL;
    return pk__recorder_append(context, recorder, learning_rate, batch, gradient_scale, moments, state,
                               weights_after);
}

PK_API size_t pk_recorder_choose_keep_every(size_t parameters, size_t steps, size_t state_vectors,
                                            uint64_t bytes)
{
    double row = (double)parameters * sizeof(double); /* exact below 2^50 parameters */
    if (((double)steps + 1) * row <= (double)bytes)
        return 1;
    /* R rows fit: floor(S / k) + 1 <= R where k > S / R. */
    double rows = floor(((double)bytes - 8 * ((double)steps + 1)) / (row * (1 + (double)state_vectors)));
    if (!(rows >= 1))
        return 0;
    size_t every = rows > (double)steps ? 2 : steps / (size_t)rows + 1;
    return every < 2 ? 2 : every;
}

PK_API pk_status pk_recorder_close(pk_context *context, pk_recorder *recorder)
{
    return recorder ? pk__recorder_end(context, context, recorder) : PK_OK;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
