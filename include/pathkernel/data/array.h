/* pathkernel/data/array.h: n-dimensional arrays in NumPy's .npy files: mapped, written, grown by whole rows.
 *
 * Files are little-endian, in C order, of floating-point numbers, integers or bools. They are regular files: a pipe or a directory is
 * refused at once, and a symbolic link where a file is to be written; no file gets descriptor 0, 1 or 2, so that what a
 * program prints never ends in it. Every size in a file is checked against the file before it is believed. Growing files
 * are not synchronised: what a process wrote survives the process, a power cut may cost the last seconds.
 */
#ifndef PATHKERNEL_ARRAY_H
#define PATHKERNEL_ARRAY_H
#include "../base/context.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_type {
    PK_FLOAT64 = 1,
    PK_FLOAT32,
    PK_INT64,
    PK_UINT8,
    PK_INT8,
    PK_INT16,
    PK_INT32,
    PK_UINT16,
    PK_UINT32,
    PK_BOOL /* one byte, 0 or 1 */
} pk_type;

/* Bytes of one item, and NumPy's name ("float64"); 0 and "unknown" for other values. */
PK_API size_t pk_type_size(pk_type type);
PK_API const char *pk_type_name(pk_type type);

/* 1 for the integers and bool, whose items every int64_t holds; 0 for others. */
PK_API int pk_type_is_integer(pk_type type);

#define PK_ARRAY_RANK 8

/* A read-only array in C order: a view of memory, memory of its own, or a mapped file. Zeroed: none.
 * Item (i0, i1, ...) is item (i0 * shape[1] + i1) * shape[2] + ... of data, which is aligned for its type. */
typedef struct pk_array {
    pk_type type;
    int rank; /* 0: one item */
    size_t shape[PK_ARRAY_RANK];
    const void *data;
    size_t row_items;   /* shape[1] * shape[2] * ... */
    size_t extra_bytes; /* PK_ARRAY_PARTIAL: bytes in the file after its last whole row */
    /* Private: how to release. */
    void *mapping;
    size_t mapping_bytes;
    void *owned;
    int file; /* descriptor + 1 of the file that pk_array_read reads; 0: none */
    size_t file_offset;
} pk_array;

/* A view of memory that must outlive it. Zeroed where rank is not in [0, PK_ARRAY_RANK], the type is
 * unknown, or the size overflows. */
PK_API pk_array pk_array_view(pk_type type, int rank, const size_t *shape, const void *data);

/* Rows first .. first + count - 1 as a view; they must exist. */
PK_API pk_array pk_array_rows(const pk_array *array, size_t first, size_t count);

/* The number of items, and of rows (shape[0]; 1 for rank 0). */
PK_API size_t pk_array_items(const pk_array *array);
PK_API size_t pk_array_length(const pk_array *array);

/* The file may be in the middle of being appended to: its size says how many whole rows it has, not its
 * header, which may lag behind or run ahead. */
#define PK_ARRAY_PARTIAL 1u
/* Keep the file open, so that pk_array_read reads it and not the mapping. */
#define PK_ARRAY_KEEP_OPEN 2u

/* Maps a .npy file (versions 1.0, 2.0, 3.0) and reads its header only. Without PK_ARRAY_PARTIAL the file
 * must be exactly as long as its header says. Data that the header leaves misaligned (NumPy never does)
 * is copied instead. The file must not shrink while it is mapped: touching rows that are gone is SIGBUS.
 * PK_IO: cannot be opened, is no regular file. PK_FORMAT: not .npy, truncated, a header that lies.
 * PK_UNSUPPORTED: big-endian, Fortran order, another item type, rank > PK_ARRAY_RANK.
 * PK_OVERFLOW: sizes past half the address space. *array is untouched on an error. */
PK_API PK__MUST_USE pk_status pk_array_map(pk_context *context, const char *path, unsigned flags,
                                           pk_array *array);

/* The same without a mapping: data is NULL, the file is open, and pk_array_read is the only way to the items. Whatever its
 * size, it takes no memory. */
PK_API PK__MUST_USE pk_status pk_array_open(pk_context *context, const char *path, unsigned flags,
                                            pk_array *array);

/* Gives back what the array holds, through the context it came from, and zeroes it. A zeroed array or NULL
 * is allowed. */
PK_API void pk_array_release(pk_context *context, pk_array *array);

/* out[i] = item first + i (flat index) for i < count, converted; the items must exist. */
PK_API void pk_array_reals(const pk_array *array, size_t first, size_t count, pk_real *out);

/* The same as double. */
PK_API void pk_array_doubles(const pk_array *array, size_t first, size_t count, double *out);

/* As pk_array_reals from memory or, where the array has a file that is open, from there: from several threads, too. PK_IO where the
 * file has become shorter, which a mapping answers with SIGBUS. */
PK_API PK__MUST_USE pk_status pk_array_read(pk_context *context, const pk_array *array, size_t first,
                                            size_t count, pk_real *out);

/* The same as int64_t, of an array of integers or bools in memory. */
PK_API void pk_array_integers(const pk_array *array, size_t first, size_t count, int64_t *out);

/* Whether the rows of an array are what something of the shape dims[0 .. rank - 1] takes: the same dimensions in the
 * same order, dimensions of 1 left out on both sides; or, where the rows or dims have one other dimension only, the same
 * number of items. So rows of 1x8x6 are (M, 1, 8, 6), (M, 8, 6), (M, 8, 6, 1) or (M, 48), but not (M, 6, 8), which holds
 * as many numbers in another order. name stands before the message. PK_SHAPE. */
PK_API PK__MUST_USE pk_status pk_array_check_rows(pk_context *context, const pk_array *array, int rank,
                                                  const size_t *dims, const char *name);

/* Writes a whole file: path + ".tmp" first, then renamed, so that path is either as before or complete.
 * PK_ARGUMENT, PK_OVERFLOW, PK_MEMORY, PK_IO. */
PK_API PK__MUST_USE pk_status pk_array_write(pk_context *context, const char *path, pk_type type, int rank,
                                             const size_t *shape, const void *data);

/* A .npy file that grows by whole rows. Zeroed: closed. One writer a file. At any instant, kill -9 included,
 * the file holds every row whose append returned, np.load can read it, and pk_array_map with
 * PK_ARRAY_PARTIAL sees all of them. */
typedef struct pk_array_writer {
    size_t rows; /* read only: whole rows in the file */
    /* Private: */
    int file; /* descriptor + 1; 0: closed */
    pk_type type;
    int rank;
    size_t shape[PK_ARRAY_RANK];
    size_t row_bytes, header_bytes, header_rows, appends;
    char name[96]; /* the end of the path, for messages */
} pk_array_writer;

/* Makes a file of no rows, or empties an existing one. row_shape = shape[1 .. rank - 1], rank >= 1; a row
 * must have at least one item. */
PK_API PK__MUST_USE pk_status pk_array_create(pk_context *context, const char *path, pk_type type, int rank,
                                              const size_t *row_shape, pk_array_writer *writer);

/* Opens a file for appending after its first rows rows and cuts off what follows them. PK_SHAPE where the
 * file has another type or row shape, or fewer rows; otherwise errors as pk_array_map. */
PK_API PK__MUST_USE pk_status pk_array_reopen(pk_context *context, const char *path, pk_type type, int rank,
                                              const size_t *row_shape, size_t rows, pk_array_writer *writer);

/* Appends whole rows with one write (2). Where the disk is full the file is cut back to its earlier rows, the
 * writer stays usable, and the status is PK_IO. The header is rewritten at every 256th append only. */
PK_API PK__MUST_USE pk_status pk_array_append(pk_context *context, pk_array_writer *writer, size_t rows,
                                              const void *data);

/* Brings the row count in the header up to date. */
PK_API PK__MUST_USE pk_status pk_array_flush(pk_context *context, pk_array_writer *writer);

/* Flushes and closes; the writer is closed and zeroed whatever the status. A zeroed writer is allowed. */
PK_API PK__MUST_USE pk_status pk_array_close(pk_context *context, pk_array_writer *writer);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_ARRAY_IMPLEMENTED)
#define PATHKERNEL_ARRAY_IMPLEMENTED
/* >>> implementation */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pathkernel maps little-endian files: it needs a little-endian machine"
#endif
PK__BEGIN_COLD_CODE

/* ---- texts ---- */

/* Names in messages are the ends of paths, so that a long path never hides the sentence. */
PK__PRIVATE const char *pk__name(const char *path)
{
    size_t length = strlen(path);
    return length > 160 ? path + length - 160 : path;
}

/* "(1437, 8, 8)". Returns text. */
PK__PRIVATE const char *pk__shape_text(const pk_array *array, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < array->rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, i ? ", %zu" : "%zu", array->shape[i]);
    if (used < size)
        snprintf(text + used, size - used, array->rank == 1 ? ",)" : ")");
    return text;
}

/* ---- files ---- */

typedef struct pk__file {
    unsigned char *bytes; /* NULL where size is 0 */
    size_t size;
} pk__file;

/* openat; the descriptor is above those of standard input, output and error. */
PK__PRIVATE int pk__open_above(int folder, const char *path, int flags)
{
    const int file = openat(folder, path, flags | O_CLOEXEC, 0666);
    if (file < 0 || file > STDERR_FILENO)
        return file;
    const int higher = fcntl(file, F_DUPFD_CLOEXEC, STDERR_FILENO + 1), reason = errno;
    (void)close(file);
    errno = reason;
    return higher;
}

/* Opens a regular file of a folder (AT_FDCWD: of the process), and nothing else: flags as of open, with O_RDONLY or
 * O_WRONLY. What waits (a pipe) is not waited for, links are not followed to where they would be written, and the
 * descriptor is above those of standard input, output and error, also in a process where these are closed. -1 and errno;
 * *kind then names what is no file, or is NULL. */
PK__PRIVATE int pk__open_regular(int folder, const char *path, int flags, const char **kind)
{
    struct stat about;
    const int writes = (flags & O_ACCMODE) != O_RDONLY;
    int file = pk__open_above(folder, path, flags | O_NONBLOCK | O_NOCTTY | (writes ? O_NOFOLLOW : 0));
    int reason = errno, good = file >= 0;
    *kind = NULL;
    if (good && fstat(file, &about) != 0) {
        reason = errno;
        good = 0;
    } else if (good ? !S_ISREG(about.st_mode)
                    : writes && reason != EISDIR && fstatat(folder, path, &about, AT_SYMLINK_NOFOLLOW) == 0 &&
                          !S_ISREG(about.st_mode)) {
        *kind = S_ISDIR(about.st_mode)   ? "a directory"
                : S_ISLNK(about.st_mode) ? "a symbolic link"
                                         : "a device or a pipe";
        reason = good ? EINVAL : reason;
        good = 0;
    }
    if (!good && file >= 0)
        (void)close(file);
    errno = reason;
    return good ? file : -1;
}

/* The same with a message; what: "cannot be made". */
static pk_status pk__open_named(pk_context *context, const char *path, int flags, const char *what, int *file)
{
    const char *kind;
    *file = pk__open_regular(AT_FDCWD, path, flags, &kind);
    if (*file >= 0)
        return PK_OK;
    const int reason = errno;
    return kind ? pk__fail(context, PK_IO, "%s: is %s, not a file", pk__name(path), kind)
                : pk__fail(context, PK_IO, "%s: %s: %s", pk__name(path), what, strerror(reason));
}

/* Maps a whole regular file, read-only. *kept, unless kept is NULL: the descriptor. */
static pk_status pk__file_open(pk_context *context, const char *path, pk__file *file, int *kept)
{
    const char *name = pk__name(path);
    struct stat about;
    int descriptor;
    file->bytes = NULL;
    file->size = 0;
    pk_status status = pk__open_named(context, path, O_RDONLY, "cannot be opened", &descriptor);
    if (status)
        return status;
    if (fstat(descriptor, &about) != 0)
        status = pk__fail(context, PK_IO, "%s: cannot be read: %s", name, strerror(errno));
    else if ((uint64_t)about.st_size > SIZE_MAX / 2)
        status = pk__fail(context, PK_OVERFLOW, "%s: too long to be mapped", name);
    else
        file->size = (size_t)about.st_size;
    if (file->size) {
        void *mapping = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (mapping == MAP_FAILED) {
            status = pk__fail(context, PK_IO, "%s: cannot be mapped: %s", name, strerror(errno));
            file->size = 0;
        } else {
            file->bytes = mapping;
        }
    }
    if (!status && kept)
        *kept = descriptor;
    else
        (void)close(descriptor);
    return status;
}

PK__PRIVATE pk_status pk__file_map(pk_context *context, const char *path, pk__file *file)
{
    return pk__file_open(context, path, file, NULL);
}

PK__PRIVATE void pk__file_unmap(pk__file *file)
{
    if (file->bytes)
        munmap(file->bytes, file->size);
    file->bytes = NULL;
    file->size = 0;
}

/* 1, or 0 with errno set: all the bytes at offset. One call unless the system stops short. */
static int pk__write_at(int descriptor, const void *data, size_t bytes, size_t offset)
{
    const unsigned char *at = (const unsigned char *)data;
    while (bytes) {
        ssize_t written = pwrite(descriptor, at, bytes, (off_t)offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0) {
            if (written == 0)
                errno = ENOSPC;
            return 0;
        }
        at += written;
        offset += (size_t)written;
        bytes -= (size_t)written;
    }
    return 1;
}

/* Gives the file that size, with room on the disk for all of it: 0, or an errno. A mapping of a file with holes would answer
 * with SIGBUS where the disk is full, and on some file systems even when a hole is only read. */
PK__PRIVATE int pk__file_reserve(int descriptor, size_t size)
{
    if (ftruncate(descriptor, (off_t)size) != 0)
        return errno;
#ifdef __linux__
    return posix_fallocate(descriptor, 0, (off_t)size);
#else
    return 0;
#endif
}

/* ---- arrays ---- */

/* By pk_type. */
static const struct pk__type {
    const char *name, *descr; /* NumPy's; the first character of descr is '<' or, for bytes, '|' */
    size_t size;
    int integer;
} pk__types[] = {{"unknown", "", 0, 0},   {"float64", "<f8", 8, 0}, {"float32", "<f4", 4, 0},
                 {"int64", "<i8", 8, 1},  {"uint8", "|u1", 1, 1},   {"int8", "|i1", 1, 1},
                 {"int16", "<i2", 2, 1},  {"int32", "<i4", 4, 1},   {"uint16", "<u2", 2, 1},
                 {"uint32", "<u4", 4, 1}, {"bool", "|b1", 1, 1}};
enum { PK__TYPES = sizeof pk__types / sizeof *pk__types };

static const struct pk__type *pk__type_of(pk_type type)
{
    return &pk__types[(unsigned)type < PK__TYPES ? (unsigned)type : 0];
}

PK_API size_t pk_type_size(pk_type type)
{
    return pk__type_of(type)->size;
}

PK_API const char *pk_type_name(pk_type type)
{
    return pk__type_of(type)->name;
}

PK_API int pk_type_is_integer(pk_type type)
{
    return pk__type_of(type)->integer;
}

/* Sets row_items and *bytes; 0 on overflow. Empty dimensions count as 1 in the check, so that every partial
 * product of the shape can be formed. */
PK__PRIVATE int pk__array_measure(pk_array *array, size_t *bytes)
{
    size_t bound = pk_type_size(array->type);
    array->row_items = 1;
    for (int i = 0; i < array->rank; i++) {
        if (!pk__multiply(bound, array->shape[i] ? array->shape[i] : 1, &bound) || bound > SIZE_MAX / 2)
            return 0;
        if (i)
            array->row_items *= array->shape[i];
    }
    *bytes = pk_type_size(array->type) * pk_array_items(array);
    return 1;
}

PK_API pk_array pk_array_view(pk_type type, int rank, const size_t *shape, const void *data)
{
    pk_array array, none;
    size_t bytes;
    memset(&none, 0, sizeof none);
    array = none;
    if (!pk_type_size(type) || rank < 0 || rank > PK_ARRAY_RANK)
        return none;
    array.type = type;
    array.rank = rank;
    for (int i = 0; i < rank; i++)
        array.shape[i] = shape[i];
    if (!pk__array_measure(&array, &bytes))
        return none;
    array.data = data;
    return array;
}

PK_API pk_array pk_array_rows(const pk_array *array, size_t first, size_t count)
{
    size_t shape[PK_ARRAY_RANK];
    memcpy(shape, array->shape, sizeof shape);
    shape[0] = count;
    const char *data = (const char *)array->data;
    size_t offset = first * array->row_items * pk_type_size(array->type);
    return pk_array_view(array->type, array->rank, shape, offset ? data + offset : data);
}

PK_API void pk_array_release(pk_context *context, pk_array *array)
{
    if (!array)
        return;
    if (array->mapping)
        munmap(array->mapping, array->mapping_bytes);
    if (array->file)
        (void)close(array->file - 1);
    pk_release(context, array->owned);
    memset(array, 0, sizeof *array);
}

PK_API size_t pk_array_length(const pk_array *array)
{
    return array->rank ? array->shape[0] : 1;
}

PK_API size_t pk_array_items(const pk_array *array)
{
    return pk_array_length(array) * array->row_items;
}

/* out[i] = item first + i as the type `to`. */
#define PK__CONVERT(from, to)                                \
    for (size_t i = 0; i < count; i++)                       \
        out[i] = (to)((const from *)array->data)[first + i]; \
    break
#define PK__CONVERT_ALL(to)                                                  \
    if (count && array->type == (sizeof(to) == 8 ? PK_FLOAT64 : PK_FLOAT32)) \
        memcpy(out, (const to *)array->data + first, count * sizeof(to));    \
    else if (count)                                                          \
        switch (array->type) {                                               \
        case PK_FLOAT64: PK__CONVERT(double, to);                            \
        case PK_FLOAT32: PK__CONVERT(float, to);                             \
        case PK_INT64: PK__CONVERT(int64_t, to);                             \
        case PK_INT32: PK__CONVERT(int32_t, to);                             \
        case PK_INT16: PK__CONVERT(int16_t, to);                             \
        case PK_INT8: PK__CONVERT(int8_t, to);                               \
        case PK_UINT32: PK__CONVERT(uint32_t, to);                           \
        case PK_UINT16: PK__CONVERT(uint16_t, to);                           \
        case PK_UINT8: PK__CONVERT(uint8_t, to);                             \
        case PK_BOOL: PK__CONVERT(uint8_t, to);                              \
        }

PK_API void pk_array_reals(const pk_array *array, size_t first, size_t count,
                           pk_real *out){PK__CONVERT_ALL(pk_real)}

PK_API void pk_array_doubles(const pk_array *array, size_t first, size_t count,
                             double *out){PK__CONVERT_ALL(double)}
#undef PK__CONVERT_ALL
#undef PK__CONVERT

PK_API pk_status
    pk_array_read(pk_context *context, const pk_array *array, size_t first, size_t count, pk_real *out)
{
    if (!array->file) {
        pk_array_reals(array, first, count, out);
        return PK_OK;
    }
    double block[512];
    const size_t size = pk_type_size(array->type);
    const int direct = array->type == (sizeof(pk_real) == sizeof(double) ? PK_FLOAT64 : PK_FLOAT32);
    for (size_t done = 0; done < count;) {
        const size_t items = direct ? count - done : pk__min(count - done, sizeof block / size);
        void *to = direct ? (void *)(out + done) : (void *)block;
        for (size_t have = 0; have < items * size;) {
            const ssize_t got = pread(array->file - 1, (char *)to + have, items * size - have,
                                      (off_t)(array->file_offset + (first + done) * size + have));
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0)
                return pk__fail(context, PK_IO, "cannot be read: %s", strerror(errno));
            if (got == 0)
                return pk__fail(context, PK_IO, "became shorter while it was read: item %zu is gone",
                                first + done);
            have += (size_t)got;
        }
        if (!direct) {
            const pk_array view = pk_array_view(array->type, 1, &items, block);
            pk_array_reals(&view, 0, items, out + done);
        }
        done += items;
    }
    return PK_OK;
}

PK_API void pk_array_integers(const pk_array *array, size_t first, size_t count, int64_t *out)
{
#define PK__CONVERT(from)                                         \
    for (size_t i = 0; i < count; i++)                            \
        out[i] = (int64_t)((const from *)array->data)[first + i]; \
    break
    if (!count)
        return;
    switch (array->type) {
    case PK_INT64: PK__CONVERT(int64_t);
    case PK_INT32: PK__CONVERT(int32_t);
    case PK_INT16: PK__CONVERT(int16_t);
    case PK_INT8: PK__CONVERT(int8_t);
    case PK_UINT32: PK__CONVERT(uint32_t);
    case PK_UINT16: PK__CONVERT(uint16_t);
    case PK_UINT8: PK__CONVERT(uint8_t);
    case PK_BOOL: PK__CONVERT(uint8_t);
    case PK_FLOAT64:
    case PK_FLOAT32: memset(out, 0, count * sizeof *out); /* not asked for */
    }
#undef PK__CONVERT
}

/* The dimensions that are not 1, of which there may be none. Returns how many. */
static int pk__proper_dims(int rank, const size_t *dims, size_t proper[PK_ARRAY_RANK])
{
    int count = 0;
    for (int i = 0; i < rank; i++)
        if (dims[i] != 1)
            proper[count++] = dims[i];
    return count;
}

PK_API pk_status pk_array_check_rows(pk_context *context, const pk_array *array, int rank, const size_t *dims,
                                     const char *name)
{
    size_t has[PK_ARRAY_RANK], takes[PK_ARRAY_RANK], items = 1, used = 0;
    char rows[200], wanted[200] = "";
    if (!array || !array->type || array->rank < 1 || rank < 0 || rank > PK_ARRAY_RANK || (rank && !dims) ||
        !name)
        return pk__fail(context, PK_ARGUMENT, "%s: no array of rows, or no shape to compare it with",
                        name ? name : "rows");
    const int count = pk__proper_dims(array->rank - 1, array->shape + 1, has);
    const int expected = pk__proper_dims(rank, dims, takes);
    for (int i = 0; i < rank; i++)
        if (!pk__multiply(items, dims[i], &items))
            items = SIZE_MAX;
    int same = count == expected || count <= 1 || expected <= 1;
    for (int i = 0; same && count == expected && i < count; i++)
        same = has[i] == takes[i];
    if (same && array->row_items == items)
        return PK_OK;
    for (int i = 0; i < rank && used < sizeof wanted; i++)
        used += (size_t)snprintf(wanted + used, sizeof wanted - used, i ? "x%zu" : "%zu", dims[i]);
    pk__shape_text(array, rows, sizeof rows);
    if (array->row_items != items)
        return pk__fail(context, PK_SHAPE, "%s has shape %s, rows of %zu numbers; the network takes %s%s%zu%s",
                        name, rows, array->row_items, rank > 1 ? wanted : "", rank > 1 ? ", which are " : "",
                        items,
                        array->rank == 1 && array->shape[0] == items ? " (one input has shape (1, ...))" : "");
    return pk__fail(context, PK_SHAPE,
                    "%s has shape %s; the network takes %s: as many numbers, but in another order of the axes",
                    name, rows, wanted);
}

/* ---- .npy headers: a Python dictionary of three entries ---- */

typedef struct pk__npy {
    const char *descr;
    size_t descr_length;
    int seen[3];                                /* descr, fortran_order, shape */
    int fortran, rank, negative, large, quoted; /* rank may exceed PK_ARRAY_RANK */
    size_t shape[PK_ARRAY_RANK];
} pk__npy;

typedef struct pk__cursor {
    const char *at, *end;
} pk__cursor;

/* The next character that is no space, which stays; 0 at the end. */
static char pk__peek(pk__cursor *text)
{
    while (text->at < text->end &&
           (*text->at == ' ' || *text->at == '\n' || *text->at == '\t' || *text->at == '\r'))
        text->at++;
    return text->at < text->end ? *text->at : (char)0;
}

static int pk__take(pk__cursor *text, char wanted)
{
    if (wanted == 0 || pk__peek(text) != wanted)
        return 0;
    text->at++;
    return 1;
}

static int pk__take_word(pk__cursor *text, const char *word)
{
    size_t length = strlen(word);
    pk__peek(text);
    if ((size_t)(text->end - text->at) < length || memcmp(text->at, word, length) != 0)
        return 0;
    text->at += length;
    return 1;
}

static int pk__take_string(pk__cursor *text, const char **string, size_t *length)
{
    char quote = pk__peek(text);
    if (quote != '\'' && quote != '"')
        return 0;
    const char *start = ++text->at;
    while (text->at < text->end && *text->at != quote)
        text->at++;
    if (text->at == text->end)
        return 0;
    *string = start;
    *length = (size_t)(text->at++ - start);
    return 1;
}

/* partial: the number of rows, which is not believed then, may be half replaced by a longer one: "1 99". */
static int pk__take_shape(pk__cursor *text, int partial, pk__npy *header)
{
    if (!pk__take(text, '('))
        return 0;
    while (!pk__take(text, ')')) {
        size_t size = 0;
        const char *start;
        int negative = pk__take(text, '-');
        for (start = text->at; text->at < text->end && *text->at >= '0' && *text->at <= '9'; text->at++) {
            if (size > (SIZE_MAX - 9) / 10)
                header->large = 1;
            else
                size = 10 * size + (size_t)(*text->at - '0');
        }
        if (text->at == start)
            return 0;
        for (; partial && header->rank == 0; text->at++) {
            const char next = pk__peek(text);
            if (next < '0' || next > '9')
                break;
        }
        pk__take(text, 'L'); /* Python 2's long */
        header->negative |= negative;
        if (header->rank < PK_ARRAY_RANK)
            header->shape[header->rank] = size;
        header->rank++;
        if (!pk__take(text, ',')) {
            /* (3) is a number in Python, not a tuple */
            if (header->rank == 1 || !pk__take(text, ')'))
                return 0;
            break;
        }
    }
    return 1;
}

/* 1, or 0 where the text is no such dictionary. */
static int pk__npy_dictionary(pk__cursor *text, int partial, pk__npy *header)
{
    static const char *const keys[] = {"descr", "fortran_order", "shape"};
    memset(header, 0, sizeof *header);
    if (!pk__take(text, '{'))
        return 0;
    while (!pk__take(text, '}')) {
        const char *key = NULL;
        size_t length = 0;
        int which = 0;
        if (!pk__take_string(text, &key, &length) || !pk__take(text, ':'))
            return 0;
        while (which < 3 && (strlen(keys[which]) != length || memcmp(keys[which], key, length) != 0))
            which++;
        if (which == 3 || header->seen[which]++)
            return 0;
        if (which == 2) {
            if (!pk__take_shape(text, partial, header))
                return 0;
        } else if (which == 1) {
            header->fortran = pk__take_word(text, "True");
            if (!header->fortran && !pk__take_word(text, "False"))
                return 0;
        } else if (pk__take_string(text, &header->descr, &header->descr_length)) {
            header->quoted = 1;
        } else if (pk__peek(text) == '[') { /* a structured type, not to be read but to be named */
            const char *string;
            size_t depth = 0;
            header->descr = text->at;
            do {
                char next = pk__peek(text);
                if (next == '\'' || next == '"') {
                    if (!pk__take_string(text, &string, &length))
                        return 0;
                } else if (next == 0) {
                    return 0;
                } else {
                    depth += next == '[';
                    depth -= next == ']';
                    text->at++;
                }
            } while (depth);
            header->descr_length = (size_t)(text->at - header->descr);
        } else {
            return 0;
        }
        if (!pk__take(text, ',') && pk__peek(text) != '}')
            return 0;
    }
    pk__peek(text);
    return text->at == text->end && header->seen[0] && header->seen[1] && header->seen[2];
}

static pk_type pk__npy_type(const char *descr, size_t length)
{
    for (int type = 1; length == 3 && type < PK__TYPES; type++) {
        const char *known = pk__types[type].descr;
        const int order = known[0] == '|' || descr[0] == '<' || descr[0] == '='; /* bytes have none */
        if (order && descr[1] == known[1] && descr[2] == known[2])
            return (pk_type)type;
    }
    return (pk_type)0;
}

enum { PK__NPY_LONGEST = 65535 }; /* the longest header of version 1.0 */

/* The array that the bytes of a .npy file hold, but for its data, which start at bytes[*offset]. */
PK__PRIVATE pk_status pk__npy_parse(pk_context *context, const char *name, const unsigned char *bytes,
                                    size_t size, unsigned flags, pk_array *array, size_t *offset)
{
    char text[64];
    pk__npy header;
    if (size == 0)
        return pk__fail(context, PK_FORMAT, "%s: is empty, not a .npy file", name);
    if (memcmp(bytes, "\x93NUMPY", size < 6 ? size : 6) != 0)
        return pk__fail(context, PK_FORMAT, "%s: is not a .npy file%s", name,
                        size > 3 && memcmp(bytes, "PK\3\4", 4) == 0        ? " but a .npz or zip archive"
                        : size > 1 && bytes[0] == 0x1f && bytes[1] == 0x8b ? " but compressed by gzip"
                                                                           : "");
    if (size < 12)
        return pk__fail(context, PK_FORMAT, "%s: the header is cut off: %zu bytes", name, size);
    if (bytes[6] < 1 || bytes[6] > 3 || bytes[7] != 0)
        return pk__fail(context, PK_UNSUPPORTED, "%s: version %d.%d of .npy is not supported", name, bytes[6],
                        bytes[7]);
    size_t start = bytes[6] == 1 ? 10 : 12, length = (size_t)bytes[8] | (size_t)bytes[9] << 8;
    if (bytes[6] > 1)
        length |= (size_t)bytes[10] << 16 | (size_t)bytes[11] << 24;
    if (length > PK__NPY_LONGEST)
        return pk__fail(context, PK_FORMAT, "%s: a header of %zu bytes is none of NumPy's", name, length);
    if (length > size - start)
        return pk__fail(context, PK_FORMAT, "%s: the header is cut off: %zu bytes of %zu", name, size - start,
                        length);
    pk__cursor cursor = {(const char *)bytes + start, (const char *)bytes + start + length};
    if (!pk__npy_dictionary(&cursor, (flags & PK_ARRAY_PARTIAL) != 0, &header))
        return pk__fail(context, PK_FORMAT, "%s: the header is not NumPy's: %s", name,
                        pk__printable((const char *)bytes + start, length, text, sizeof text));
    pk_array found;
    memset(&found, 0, sizeof found);
    found.type = header.quoted ? pk__npy_type(header.descr, header.descr_length) : (pk_type)0;
    pk__printable(header.descr, header.descr_length, text, sizeof text);
    if (!found.type)
        return pk__fail(
            context, PK_UNSUPPORTED,
            text[0] == '>'
                ? "%s: items are big-endian ('%s'); write them little-endian"
                : "%s: items of type %s are not supported; float64, float32, bool and integers of up to "
                  "64 bits with a sign or 32 without are",
            name, text);
    if (header.rank > PK_ARRAY_RANK)
        return pk__fail(context, PK_UNSUPPORTED, "%s: %d dimensions, more than %d", name, header.rank,
                        PK_ARRAY_RANK);
    if (header.negative)
        return pk__fail(context, PK_FORMAT, "%s: a negative dimension", name);
    found.rank = header.rank;
    int long_dimensions = 0;
    for (int i = 0; i < header.rank; i++) {
        found.shape[i] = header.shape[i];
        long_dimensions += header.shape[i] > 1;
    }
    char shape[200];
    pk__shape_text(&found, shape, sizeof shape);
    if (header.fortran && long_dimensions > 1)
        return pk__fail(context, PK_UNSUPPORTED, "%s: %s in Fortran order; save it with np.ascontiguousarray",
                        name, shape);
    size_t expected = 0, row_bytes = 0, held = size - start - length;
    if (header.large || !pk__array_measure(&found, &expected))
        return pk__fail(context, PK_OVERFLOW, "%s: the header's shape %s overflows", name, shape);
    row_bytes = found.row_items * pk_type_size(found.type);
    if ((flags & PK_ARRAY_PARTIAL) && found.rank && row_bytes) {
        found.shape[0] = held / row_bytes;
        found.extra_bytes = held % row_bytes;
    } else if (expected != held) {
        return pk__fail(context, PK_FORMAT, "%s: %s %s takes %zu bytes, the file holds %zu", name, shape,
                        pk_type_name(found.type), expected, held);
    }
    *array = found;
    *offset = start + length;
    return PK_OK;
}

/* Writes a header of version 1.0 that fills room bytes, or with room == 0 as many as numpy.save would use for
 * an array whose first dimension is to grow. Returns the bytes, or 0 where they do not suffice. grows: the rows have the
 * same place whatever their number is, where there is room for that, so that a header that is half replaced can be
 * read. */
enum { PK__NPY_ROOM = 4096 };
static size_t pk__npy_header(const pk_array *array, size_t room, int grows, unsigned char bytes[PK__NPY_ROOM])
{
    const char *descr = pk__type_of(array->type)->descr;
    char shape[200], digits[24];
    pk__shape_text(array, shape, sizeof shape);
    if (grows) {
        const int gap = 20 - snprintf(digits, sizeof digits, "%zu", array->shape[0]);
        memmove(shape + 1 + gap, shape + 1, strlen(shape));
        memset(shape + 1, ' ', (size_t)gap);
    }
    char *text = (char *)bytes + 10;
    size_t length =
        10 + (size_t)snprintf(text, PK__NPY_ROOM - 10, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }",
                              descr, shape);
    if (!room) {
        size_t growth =
            array->rank && !grows ? 20 - (size_t)snprintf(digits, sizeof digits, "%zu", array->shape[0]) : 0;
        room = (length + growth + 1 + 63) / 64 * 64;
    }
    if (length + 1 > room && grows)
        return pk__npy_header(array, room, 0, bytes);
    if (length + 1 > room || room > PK__NPY_ROOM)
        return 0;
    memcpy(bytes, "\x93NUMPY\1", 8); /* version 1 and the 0 after it */
    bytes[8] = (unsigned char)((room - 10) & 255);
    bytes[9] = (unsigned char)((room - 10) >> 8);
    memset(bytes + length, ' ', room - length - 1);
    bytes[room - 1] = '\n';
    return room;
}

/* Brings a header of a file from old to new, writing only what differs. 0 with errno set. */
static int pk__npy_replace(int descriptor, const unsigned char *before, const unsigned char *after, size_t room)
{
    size_t first = 0, last = room;
    while (first < room && before[first] == after[first])
        first++;
    while (last > first && before[last - 1] == after[last - 1])
        last--;
    return pk__write_at(descriptor, after + first, last - first, first);
}

PK_API pk_status pk_array_map(pk_context *context, const char *path, unsigned flags, pk_array *array)
{
    if (!path || !array)
        return pk__fail(context, PK_ARGUMENT, "pk_array_map: the path or the array is NULL");
    pk__file file;
    pk_array found;
    size_t offset = 0;
    int descriptor = -1;
    pk_status status = pk__file_open(context, path, &file, flags & PK_ARRAY_KEEP_OPEN ? &descriptor : NULL);
    if (!status)
        status = pk__npy_parse(context, pk__name(path), file.bytes, file.size, flags, &found, &offset);
    if (!status && offset % pk_type_size(found.type) == 0) {
        found.data = file.bytes + offset;
        found.mapping = file.bytes;
        found.mapping_bytes = file.size;
    } else if (!status) {
        size_t items = pk_array_items(&found), size = pk_type_size(found.type);
        status = pk_allocate(context, items, size, pk__name(path), &found.owned);
        if (!status && items)
            memcpy(found.owned, file.bytes + offset, items * size);
        found.data = found.owned;
        pk__file_unmap(&file);
    }
    found.file = descriptor + 1;
    found.file_offset = offset;
    if (!status) {
        *array = found;
        return PK_OK;
    }
    pk__file_unmap(&file);
    if (descriptor >= 0)
        (void)close(descriptor);
    return status;
}

PK_API pk_status pk_array_open(pk_context *context, const char *path, unsigned flags, pk_array *array)
{
    if (!path || !array)
        return pk__fail(context, PK_ARGUMENT, "pk_array_open: the path or the array is NULL");
    pk__file file;
    pk_array found;
    int descriptor = -1;
    size_t offset = 0;
    pk_status status = pk__file_open(context, path, &file, &descriptor);
    if (status)
        return status;
    status = pk__npy_parse(context, pk__name(path), file.bytes, file.size, flags, &found, &offset);
    pk__file_unmap(&file);
    if (status) {
        (void)close(descriptor);
        return status;
    }
    *array = found;
    array->file = descriptor + 1;
    array->file_offset = offset;
    return PK_OK;
}

/* ---- writing ---- */

PK_API pk_status pk_array_write(pk_context *context, const char *path, pk_type type, int rank,
                                const size_t *shape, const void *data)
{
    unsigned char header[PK__NPY_ROOM];
    if (!path || rank < 0 || rank > PK_ARRAY_RANK || (rank && !shape) || !pk_type_size(type))
        return pk__fail(context, PK_ARGUMENT,
                        "pk_array_write: rank %d or type %d is invalid, or a pointer is NULL", rank, (int)type);
    pk_array array = pk_array_view(type, rank, shape, data);
    if (!array.type)
        return pk__fail(context, PK_OVERFLOW, "%s: the shape overflows", pk__name(path));
    size_t bytes = pk_array_items(&array) * pk_type_size(type), room = pk__npy_header(&array, 0, 0, header);
    size_t length = strlen(path);
    if (bytes && !data)
        return pk__fail(context, PK_ARGUMENT, "%s: the data are NULL", pk__name(path));
    char *aside = NULL;
    pk_status status = pk_allocate(context, length + 5, 1, "the name of a file", &aside);
    if (status)
        return status;
    memcpy(aside, path, length);
    memcpy(aside + length, ".tmp", 5);
    int file;
    status = pk__open_named(context, aside, O_WRONLY | O_CREAT, "cannot be made", &file);
    if (!status) {
        int good = ftruncate(file, 0) == 0 && pk__write_at(file, header, room, 0) &&
                   pk__write_at(file, data, bytes, room) && fsync(file) == 0,
            reason = errno;
        if (close(file) != 0 && good)
            good = 0, reason = errno;
        if (good && rename(aside, path) != 0)
            good = 0, reason = errno;
        if (!good) {
            unlink(aside);
            status = pk__fail(context, PK_IO, "%s: %zu bytes cannot be written: %s", pk__name(path),
                              room + bytes, strerror(reason));
        }
    }
    pk_release(context, aside);
    return status;
}

/* What create and reopen share: the checked shape of a writer, with no rows. */
static pk_status pk__writer_shape(pk_context *context, const char *path, pk_type type, int rank,
                                  const size_t *row_shape, pk_array_writer *writer, pk_array *array)
{
    size_t shape[PK_ARRAY_RANK] = {0};
    if (!path || !writer || rank < 1 || rank > PK_ARRAY_RANK || (rank > 1 && !row_shape) || !pk_type_size(type))
        return pk__fail(context, PK_ARGUMENT,
                        "an array to append to: rank %d or type %d is invalid, or a pointer is NULL", rank,
                        (int)type);
    for (int i = 1; i < rank; i++)
        shape[i] = row_shape[i - 1];
    *array = pk_array_view(type, rank, shape, NULL);
    if (!array->type)
        return pk__fail(context, PK_OVERFLOW, "%s: the shape of a row overflows", pk__name(path));
    if (!array->row_items)
        return pk__fail(context, PK_SHAPE, "%s: rows without items cannot be appended", pk__name(path));
    return PK_OK;
}

static void pk__writer_fill(pk_array_writer *writer, const char *path, int file, const pk_array *array,
                            size_t header_bytes)
{
    size_t length = strlen(path);
    memset(writer, 0, sizeof *writer);
    writer->rows = writer->header_rows = array->shape[0];
    writer->file = file + 1;
    writer->type = array->type;
    writer->rank = array->rank;
    memcpy(writer->shape, array->shape, sizeof writer->shape);
    writer->row_bytes = array->row_items * pk_type_size(array->type);
    writer->header_bytes = header_bytes;
    snprintf(writer->name, sizeof writer->name, "%s",
             length < sizeof writer->name ? path : path + length - (sizeof writer->name - 1));
}

PK_API pk_status pk_array_create(pk_context *context, const char *path, pk_type type, int rank,
                                 const size_t *row_shape, pk_array_writer *writer)
{
    unsigned char header[PK__NPY_ROOM];
    pk_array array;
    pk_status status = pk__writer_shape(context, path, type, rank, row_shape, writer, &array);
    if (status)
        return status;
    int file;
    status = pk__open_named(context, path, O_WRONLY | O_CREAT, "cannot be made", &file);
    if (status)
        return status;
    size_t room = pk__npy_header(&array, 0, 1, header);
    if (ftruncate(file, 0) != 0 || !pk__write_at(file, header, room, 0)) {
        status = pk__fail(context, PK_IO, "%s: cannot be written: %s", pk__name(path), strerror(errno));
        close(file);
        return status;
    }
    pk__writer_fill(writer, path, file, &array, room);
    return PK_OK;
}

PK_API pk_status pk_array_reopen(pk_context *context, const char *path, pk_type type, int rank,
                                 const size_t *row_shape, size_t rows, pk_array_writer *writer)
{
    unsigned char header[PK__NPY_ROOM], before[PK__NPY_ROOM];
    pk_array array, found;
    pk__file file;
    size_t offset = 0;
    pk_status status = pk__writer_shape(context, path, type, rank, row_shape, writer, &array);
    if (status)
        return status;
    const char *name = pk__name(path);
    status = pk__file_map(context, path, &file);
    if (!status)
        status = pk__npy_parse(context, name, file.bytes, file.size, PK_ARRAY_PARTIAL, &found, &offset);
    if (!status)
        memcpy(before, file.bytes, pk__min(offset, sizeof before));
    pk__file_unmap(&file);
    if (status)
        return status;
    int same = found.type == type && found.rank == rank;
    for (int i = 1; same && i < rank; i++)
        same = found.shape[i] == array.shape[i];
    array.shape[0] = rows;
    if (!same || rows > found.shape[0]) {
        char has[180], wanted[180];
        return pk__fail(context, PK_SHAPE, "%s: holds %s %s, wanted for appending: %s %s", name,
                        pk__shape_text(&found, has, sizeof has), pk_type_name(found.type),
                        pk__shape_text(&array, wanted, sizeof wanted), pk_type_name(type));
    }
    if (!pk__npy_header(&array, offset, 1, header))
        return pk__fail(context, PK_UNSUPPORTED, "%s: the header's %zu bytes leave no room for a row count",
                        name, offset);
    int descriptor;
    status = pk__open_named(context, path, O_WRONLY, "cannot be opened for writing", &descriptor);
    if (status)
        return status;
    /* The header first: it may lag behind the data, but never run ahead. */
    if (!pk__npy_replace(descriptor, before, header, offset) ||
        ftruncate(descriptor, (off_t)(offset + rows * array.row_items * pk_type_size(type))) != 0) {
        status = pk__fail(context, PK_IO, "%s: cannot be cut to %zu rows: %s", name, rows, strerror(errno));
        close(descriptor);
        return status;
    }
    pk__writer_fill(writer, path, descriptor, &array, offset);
    return PK_OK;
}

/* The row count into the header; 0 with errno set. */
static int pk__writer_header(pk_array_writer *writer)
{
    unsigned char header[PK__NPY_ROOM], before[PK__NPY_ROOM];
    if (writer->header_rows == writer->rows)
        return 1;
    writer->shape[0] = writer->rows;
    pk_array array = pk_array_view(writer->type, writer->rank, writer->shape, NULL), old = array;
    old.shape[0] = writer->header_rows;
    errno = EFBIG;
    if (!pk__npy_header(&array, writer->header_bytes, 1, header) ||
        !pk__npy_header(&old, writer->header_bytes, 1, before) ||
        !pk__npy_replace(writer->file - 1, before, header, writer->header_bytes))
        return 0;
    writer->header_rows = writer->rows;
    return 1;
}

PK_API pk_status pk_array_append(pk_context *context, pk_array_writer *writer, size_t rows, const void *data)
{
    size_t bytes = 0;
    if (!writer || !writer->file || (rows && !data))
        return pk__fail(context, PK_ARGUMENT, "pk_array_append: the writer is closed, or a pointer is NULL");
    size_t end = writer->header_bytes + writer->rows * writer->row_bytes;
    if (!pk__multiply(rows, writer->row_bytes, &bytes) || bytes > SIZE_MAX / 2 - end)
        return pk__fail(context, PK_OVERFLOW, "%s: %zu rows overflow", writer->name, rows);
    if (!pk__write_at(writer->file - 1, data, bytes, end)) {
        int reason = errno;
        int undone = ftruncate(writer->file - 1, (off_t)end) == 0;
        return pk__fail(context, PK_IO, "%s: %zu rows of %zu bytes cannot be appended to %zu%s: %s",
                        writer->name, rows, writer->row_bytes, writer->rows, undone ? "" : " nor cut off",
                        strerror(reason));
    }
    writer->rows += rows;
    /* The rows are safe; a header that cannot be written now may lag, and flush will tell. */
    if (++writer->appends % 256 == 0)
        (void)pk__writer_header(writer);
    return PK_OK;
}

PK_API pk_status pk_array_flush(pk_context *context, pk_array_writer *writer)
{
    if (!writer || !writer->file)
        return pk__fail(context, PK_ARGUMENT, "pk_array_flush: the writer is closed or NULL");
    if (!pk__writer_header(writer))
        return pk__fail(context, PK_IO, "%s: the header cannot be written: %s", writer->name, strerror(errno));
    return PK_OK;
}

PK_API pk_status pk_array_close(pk_context *context, pk_array_writer *writer)
{
    if (!writer || !writer->file)
        return PK_OK;
    pk_status status = pk_array_flush(context, writer);
    if (close(writer->file - 1) != 0 && !status)
        status = pk__fail(context, PK_IO, "%s: cannot be closed: %s", writer->name, strerror(errno));
    memset(writer, 0, sizeof *writer);
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
