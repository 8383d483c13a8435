/* pathkernel/kernels/file.h: a Gram matrix straight into a .npy file, part by part: larger than memory, and finished where it
 * was interrupted.
 *
 * The matrix is cut where pk_kernels cuts it (pk__kernel_block), so that the bits are the same; a part is as many of
 * these blocks as the memory limit allows, and costs a pass over the run. `path`.part remembers which parts stand in the
 * file already, of which kernel, rows and run; it is gone when the file is complete.
 */
#ifndef PATHKERNEL_FILE_H
#define PATHKERNEL_FILE_H
#include "kernel.h"

/* >>> declarations */
PK__BEGIN_C

/* What pk_kernels gives for one kernel, as the array of pk_kernel_shape in the file path. Before it starts, the disk must have
 * room for the whole file, and the progress callback is told how many bytes it takes ("kernel file, 8000128 bytes"). After a kill
 * the same call goes on behind the last part that was written; the file holds zeros where it is not complete. A map is applied
 * when all parts are there. report may be NULL; its error, points and refused include the parts of earlier calls.
 * Statuses of pk_kernels; PK_IO also where the disk is too small. PK_NOT_CLOSED: the file is complete. */
PK_API PK__MUST_USE pk_status pk_kernel_file(pk_context *context, const pk_run *run, const pk_dataset *left,
                                             const pk_dataset *right, const pk_kernel_options *options,
                                             const char *path, pk_kernel_report *report);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_FILE_IMPLEMENTED)
#define PATHKERNEL_FILE_IMPLEMENTED
/* >>> implementation */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
PK__BEGIN_COLD_CODE

typedef struct pk__kernel_file {
    pk_context *context;
    const pk_run *run;
    const pk_dataset *left, *right;
    const pk_kernel_options *options;
    const char *path;
    size_t shape[6];
    int rank;
    size_t planes, rows, columns, width; /* width: C or 1 */
    int symmetric;
    size_t cut, parts, done; /* rows and columns of a part */
    uint64_t identity;
    pk_kernel_report report; /* of the parts that are done */
    char *names;             /* path.part, path.part.tmp */
    size_t bytes, header;
    unsigned char *mapping;
    int file; /* descriptor, -1: none */
    /* Progress of all parts. */
    int (*progress)(void *, const char *, double);
    void *progress_user;
    char phase[64];
} pk__kernel_file;

static uint64_t pk__hash_bytes(uint64_t hash, const void *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
        uint64_t word = 0;
        memcpy(&word, (const unsigned char *)data + i, pk__min(bytes - i, sizeof word));
        hash = pk__checksum_mix(hash, word);
    }
    return hash;
}

static uint64_t pk__hash_number(uint64_t hash, uint64_t number)
{
    return pk__checksum_mix(hash, number);
}

static uint64_t pk__hash_array(uint64_t hash, const pk_array *array)
{
    hash = pk__hash_number(hash, (uint64_t)array->type);
    for (int i = 0; i < array->rank; i++)
        hash = pk__hash_number(hash, array->shape[i]);
    return array->data ? pk__hash_bytes(hash, array->data, pk_array_items(array) * pk_type_size(array->type))
                       : hash;
}

/* Kernel, rows and run as one number. */
static pk_status pk__file_identity(pk__kernel_file *f)
{
    const pk_kernel_options *o = f->options;
    const pk_run *run = f->run;
    const uint64_t numbers[] = {(uint64_t)o->kind,
                                (uint64_t)o->outputs,
                                o->output,
                                o->step_count,
                                (uint64_t)o->quadrature.rule,
                                (uint64_t)o->quadrature.nodes,
                                (uint64_t)o->map,
                                (uint64_t) !!o->unweighted,
                                (uint64_t) !!o->by_layer,
                                (uint64_t) !!o->append_one,
                                (uint64_t) !!o->left_train,
                                sizeof(pk_real),
                                run->steps,
                                run->parameters};
    pk_real *w = NULL;
    char *loss = NULL;
    pk_replay replay;
    memset(&replay, 0, sizeof replay);
    const size_t loss_size = pk_criterion_format(&run->criterion, NULL, 0);
    pk_status status = pk_allocate(f->context, run->parameters, sizeof *w, "kernels", &w);
    if (!status)
        status = pk_allocate(f->context, loss_size, 1, "the text of the loss", &loss);
    if (!status)
        (void)pk_criterion_format(&run->criterion, loss, loss_size);
    if (!status)
        status = pk_replay_prepare(f->context, run, 0, &replay);
    if (!status)
        status = pk_replay_weights(f->context, &replay, run->steps, w);
    uint64_t hash = pk__hash_bytes(1, numbers, sizeof numbers);
    hash = pk__hash_bytes(hash, &o->tolerance, sizeof o->tolerance);
    hash = pk__hash_bytes(hash, loss, loss ? loss_size : 0);
    if (o->steps)
        hash = pk__hash_bytes(hash, o->steps, o->step_count * sizeof *o->steps);
    hash = pk__hash_bytes(hash, run->learning_rates, run->steps * sizeof *run->learning_rates);
    hash = pk__hash_array(pk__hash_array(hash, &run->train.inputs), &run->train.targets);
    for (int s = 0; s < 2; s++) {
        const pk_dataset *side = s ? f->right : f->left;
        hash = pk__hash_number(hash, side != NULL);
        if (side)
            hash = pk__hash_array(pk__hash_array(hash, &side->inputs), &side->targets);
    }
    if (!status)
        hash = pk__hash_number(hash, (uint64_t)pk__checksum(w, run->parameters, NULL, 0));
    f->identity = hash;
    pk_replay_release(f->context, &replay);
    pk_release(f->context, loss);
    pk_release(f->context, w);
    return status;
}

/* Rows and columns of a part: blocks of pk_kernels, as many as fit. */
static void pk__file_cut(pk__kernel_file *f)
{
    const size_t B = pk__kernel_block(f->run, f->options), limit = f->context ? f->context->memory_limit : 0;
    const size_t used = f->context ? f->context->memory_used : 0;
    const double room = limit ? (double)(limit - pk__min(limit, used)) / 4 : (double)((size_t)1 << 30);
    const double entry = (double)(f->planes * f->width * f->width * sizeof(double));
    f->cut = B;
    while ((f->cut < f->rows || f->cut < f->columns) && 4 * (double)f->cut * (double)f->cut * entry <= room)
        f->cut *= 2;
}

static void pk__file_count(pk__kernel_file *f)
{
    const size_t down = pk__blocks(f->rows, f->cut), across = pk__blocks(f->columns, f->cut);
    f->parts = f->symmetric ? down * (down + 1) / 2 : down * across;
}

/* Number `part`: a symmetric matrix has those on and below the diagonal. */
static pk__kernel_part pk__file_part(const pk__kernel_file *f, size_t part)
{
    const size_t across = pk__blocks(f->columns, f->cut);
    size_t i = f->symmetric ? 0 : part / across, j = f->symmetric ? part : part % across;
    while (f->symmetric && j > i)
        j -= ++i;
    const size_t row = i * f->cut, column = j * f->cut;
    return (pk__kernel_part){row, pk__min(f->cut, f->rows - row), column, pk__min(f->cut, f->columns - column)};
}

/* The line of path.part. Reads what is done, where it is of the same kernel and its parts are not too large. */
static void pk__file_resume(pk__kernel_file *f)
{
    uint64_t identity = 0, error = 0;
    size_t cut = 0, done = 0, points = 0, refused = 0;
    FILE *file = fopen(f->names, "r");
    if (!file)
        return;
    const int read = fscanf(file, "pathkernel-kernel-file 1 %" SCNx64 " %zu %zu %" SCNx64 " %zu %zu", &identity,
                            &cut, &done, &error, &points, &refused);
    fclose(file);
    if (read != 6 || identity != f->identity || cut > f->cut || !cut ||
        cut % pk__kernel_block(f->run, f->options))
        return;
    const size_t own = f->cut;
    f->cut = cut;
    pk__file_count(f);
    if (done > f->parts) {
        f->cut = own;
        pk__file_count(f);
        return;
    }
    f->done = done;
    memcpy(&f->report.error, &error, sizeof error);
    f->report.points = points;
    f->report.refused = refused;
}

static pk_status pk__file_remember(pk__kernel_file *f, size_t done)
{
    const char *aside = f->names + strlen(f->names) + 1;
    uint64_t error;
    memcpy(&error, &f->report.error, sizeof error);
    FILE *file = fopen(aside, "w");
    int good = file != NULL;
    if (file) {
        good = fprintf(file, "pathkernel-kernel-file 1 %" PRIx64 " %zu %zu %" PRIx64 " %zu %zu\n", f->identity,
                       f->cut, done, error, f->report.points, f->report.refused) > 0;
        good &= fclose(file) == 0;
    }
    if (good && rename(aside, f->names) == 0)
        return PK_OK;
    return pk__fail(f->context, PK_IO, "%s: cannot be written: %s", pk__name(f->names), strerror(errno));
}

/* Opens or makes the file, checks the disk, and maps it. */
static pk_status pk__file_map_result(pk__kernel_file *f)
{
    unsigned char header[PK__NPY_ROOM], found[PK__NPY_ROOM];
    const pk_array array = pk_array_view(PK_FLOAT64, f->rank, f->shape, NULL);
    struct stat about;
    struct statvfs disk;
    f->header = pk__npy_header(&array, 0, 0, header);
    if (!array.type || !f->header || f->bytes > SIZE_MAX / 2 - f->header)
        return pk__fail(f->context, PK_OVERFLOW, "%s: the shape overflows", pk__name(f->path));
    const size_t size = f->header + f->bytes;
    pk_status status = pk__open_named(f->context, f->path, O_RDWR | O_CREAT, "cannot be made", &f->file);
    if (status)
        return status;
    if (fstat(f->file, &about) != 0 || fstatvfs(f->file, &disk) != 0)
        return pk__fail(f->context, PK_IO, "%s: the disk cannot be asked: %s", pk__name(f->path),
                        strerror(errno));
    const double has = (double)about.st_blocks * 512,
                 free_bytes = (double)disk.f_bavail * (double)disk.f_frsize;
    if ((double)size - has > free_bytes)
        return pk__fail(f->context, PK_IO, "%s: takes %zu bytes, the disk has room for %.0f", pk__name(f->path),
                        size, free_bytes + has);
    const ssize_t read = pread(f->file, found, f->header, 0);
    if ((size_t)about.st_size != size || read != (ssize_t)f->header || memcmp(found, header, f->header) != 0) {
        f->done = 0; /* of another shape, or not there */
        memset(&f->report, 0, sizeof f->report);
    }
    int reason = 0;
    if (!f->done && (ftruncate(f->file, 0) != 0 || !pk__write_at(f->file, header, f->header, 0)))
        reason = errno;
    if (!reason)
        reason = pk__file_reserve(f->file, size);
    if (!reason) {
        void *mapping = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, f->file, 0);
        if (mapping == MAP_FAILED)
            reason = errno;
        else
            f->mapping = mapping;
    }
    return reason ? pk__fail(f->context, PK_IO, "%s: %zu bytes cannot be written: %s", pk__name(f->path), size,
                             strerror(reason))
                  : PK_OK;
}

static int pk__file_progress(void *user, const char *phase, double fraction)
{
    const pk__kernel_file *f = user;
    (void)phase;
    return f->progress(f->progress_user, f->phase, ((double)f->done + fraction) / (double)pk__max(f->parts, 1));
}

/* Puts a part, planes x rows width x columns width, into the file; and its mirror image. */
static void pk__file_put(const pk__kernel_file *f, const pk__kernel_part *part, const double *numbers)
{
    const size_t W = f->width, ld = f->columns * W, rows = part->rows * W, columns = part->columns * W;
    const int mirrored = f->symmetric && part->row != part->column;
    double *gram = (double *)(void *)(f->mapping + f->header);
    for (size_t plane = 0; plane < f->planes; plane++, gram += f->rows * W * ld)
        for (size_t i = 0; i < rows; i++) {
            const double *from = numbers + (plane * rows + i) * columns;
            memcpy(gram + (part->row * W + i) * ld + part->column * W, from, columns * sizeof *from);
            for (size_t j = 0; mirrored && j < columns; j++)
                gram[(part->column * W + j) * ld + part->row * W + i] = from[j];
        }
}

static pk_status pk__file_parts(pk__kernel_file *f)
{
    double *numbers = NULL;
    const size_t rows = pk__min(f->cut, f->rows), columns = pk__min(f->cut, f->columns);
    pk_status status =
        pk_allocate(f->context, rows * columns, f->planes * f->width * f->width * sizeof *numbers,
                    "a part of a kernel", &numbers);
    while (!status && f->done < f->parts) {
        const pk__kernel_part part = pk__file_part(f, f->done);
        pk_kernel_report report;
        status =
            pk__kernels_part(f->context, f->run, f->left, f->right, 1, f->options, &part, &numbers, &report);
        /* Once a part could be computed: what cannot be computed leaves an older file as it is. */
        if (!status && !f->mapping)
            status = pk__file_map_result(f);
        if (status)
            break;
        pk__file_put(f, &part, numbers);
        f->report.error += report.error;
        f->report.points += report.points;
        f->report.refused += report.refused;
        status = pk__file_remember(f, ++f->done);
    }
    pk_release(f->context, numbers);
    return status;
}

static pk_status pk__file_run(pk__kernel_file *f)
{
    pk_status status = pk__file_identity(f);
    if (status)
        return status;
    pk__file_cut(f);
    pk__file_count(f);
    pk__file_resume(f);
    if (f->done)
        status = pk__file_map_result(f);
    if (!status)
        status = pk__progress(f->context, f->phase, (double)f->done / (double)pk__max(f->parts, 1));
    if (!status)
        status = pk__file_parts(f);
    /* A map is not applied twice: after a kill in the middle of it all begins again. */
    if (!status && f->options->map != PK_MAP_NONE)
        status = pk__file_remember(f, 0);
    if (!status) {
        double *gram = (double *)(void *)(f->mapping + f->header);
        status = pk__kernel_finish(f->context, f->run, f->left, f->right, f->options, gram, &f->report);
    }
    if (!status || status == PK_NOT_CLOSED)
        unlink(f->names);
    return status;
}

/* The first part of a file, as large as the limit lets it be, with all that is held beside it. */
static pk_status pk__file_sample(pk_context *context, void *user)
{
    pk__kernel_file f = *(const pk__kernel_file *)user;
    f.context = context;
    pk__file_cut(&f);
    const size_t rows = pk__min(f.cut, f.rows), columns = pk__min(f.cut, f.columns);
    pk__kernel_sample sample = {
        .run = f.run, .left = f.left, .right = f.right, .count = 1, .options = f.options};
    sample.part = (pk__kernel_part){0, rows, 0, columns};
    sample.beside = pk__kernel_beside(f.run, f.left, f.right, 1, f.options) +
                    rows * columns * f.planes * f.width * f.width * sizeof(double);
    const pk_status status = pk__file_identity(&f);
    return status ? status : pk__kernel_sample_run(context, &sample);
}

PK_API pk_status pk_kernel_file(pk_context *context, const pk_run *run, const pk_dataset *left,
                                const pk_dataset *right, const pk_kernel_options *options, const char *path,
                                pk_kernel_report *report)
{
    const double start = pk__seconds();
    pk__kernel_file f;
    memset(&f, 0, sizeof f);
    f.file = -1;
    if (!path)
        return pk__fail(context, PK_ARGUMENT, "kernels: the file has no name");
    pk_status status = pk_kernel_shape(context, run, left, right, options, f.shape, &f.rank);
    if (status)
        return status;
    pk_kernel_options own = *options;
    left = own.left_train ? NULL : left;
    own.left_train = 0;
    f.context = context, f.run = run, f.left = left, f.right = right, f.options = &own, f.path = path;
    f.planes = pk__kernel_slots(run, options) * pk__kernel_layers(run, options);
    f.rows = pk__kernel_count(run, left);
    f.columns = pk__kernel_count(run, right);
    f.width = options->outputs == PK_OUTPUTS_FULL ? run->outputs : 1;
    /* tracin weights one side of the same rows. */
    f.symmetric =
        left == right && !(!left && pk__kernel_rows[own.kind].weighted == PK__RIGHT && !own.unweighted);
    f.bytes = f.planes * f.rows * f.columns * f.width * f.width * sizeof(double);
    pk__print(f.phase, sizeof f.phase, "kernel file, %zu bytes", f.bytes + 128);
    if (!f.bytes)
        return pk_array_write(context, path, PK_FLOAT64, f.rank, f.shape, "");
    const size_t length = strlen(path);
    status = pk_allocate(context, 2 * length + 24, 1, "the name of a file", &f.names);
    if (status)
        return status;
    memcpy(f.names, path, length);
    memcpy(f.names + length, ".part", 6);
    memcpy(f.names + length + 6, path, length);
    memcpy(f.names + 2 * length + 6, ".part.tmp", 10);
    if (context && context->progress) {
        f.progress = context->progress;
        f.progress_user = context->progress_user;
        context->progress = pk__file_progress;
        context->progress_user = &f;
    }
    status = pk__file_run(&f);
    if (status == PK_MEMORY_LIMIT)
        status = pk__fail_with_least(context, "kernel file", pk__file_sample, &f);
    if (f.progress) {
        context->progress = f.progress;
        context->progress_user = f.progress_user;
    }
    if (f.mapping)
        munmap(f.mapping, f.header + f.bytes);
    if (f.file >= 0)
        (void)close(f.file);
    pk_release(context, f.names);
    if (report && (!status || status == PK_NOT_CLOSED)) {
        *report = f.report;
        report->seconds = pk__seconds() - start;
    }
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
