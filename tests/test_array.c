/* Arrays in files: what NumPy writes is read and what we write is what NumPy would, bit for bit; a file that
 * is grown is whole rows at every instant; everything malformed is refused with a sentence that names it. */
#define UNDER_TEST "pathkernel/data/dataset.h"
#include "files.h"
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#ifdef __linux__
#include <sys/mount.h>
#endif

/* ---- files ---- */

/* The file's bytes, from malloc. */
static unsigned char *read_file(const char *full, size_t *size)
{
    FILE *file = fopen(full, "rb");
    assert_non_null(file);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    *size = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = (unsigned char *)malloc(*size + 1);
    assert_non_null(bytes);
    assert_true(fread(bytes, 1, *size, file) == *size);
    fclose(file);
    return bytes;
}

static size_t file_size(const char *full)
{
    struct stat about;
    assert_int_equal(stat(full, &about), 0);
    return (size_t)about.st_size;
}

/* A .npy file as numpy.lib.format writes it: the dictionary padded to 64 bytes. Returns its size. */
static size_t make_npy(unsigned char *file, int version, const char *dictionary, const void *data, size_t bytes)
{
    size_t start = version == 1 ? 10 : 12, length = strlen(dictionary),
           room = (start + length + 1 + 63) / 64 * 64;
    memcpy(file, "\x93NUMPY", 6);
    file[6] = (unsigned char)version;
    file[7] = 0;
    memset(file + 8, 0, 4);
    file[8] = (unsigned char)((room - start) & 255);
    file[9] = (unsigned char)((room - start) >> 8);
    memset(file + start, ' ', room - start);
    memcpy(file + start, dictionary, length);
    file[room - 1] = '\n';
    if (bytes)
        memcpy(file + room, data, bytes);
    return room + bytes;
}

/* Parses a copy that ends where its memory ends, so that a sanitizer sees a read past it. */
static pk_status parse_npy(pk_context *with, const unsigned char *bytes, size_t size, unsigned flags,
                           pk_array *array, size_t *offset)
{
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1);
    assert_non_null(copy);
    memcpy(copy, bytes, size);
    pk_status status = pk__npy_parse(with, "x.npy", copy, size, flags, array, offset);
    free(copy);
    return status;
}

/* ---- .npy: reading ---- */

static void test_types(void **state)
{
    (void)state;
    assert_int_equal(pk_type_size(PK_FLOAT64), 8);
    assert_int_equal(pk_type_size(PK_FLOAT32), 4);
    assert_int_equal(pk_type_size(PK_INT64), 8);
    assert_int_equal(pk_type_size(PK_UINT8), 1);
    assert_int_equal(pk_type_size(PK_INT32) + pk_type_size(PK_UINT32), 8);
    assert_int_equal(pk_type_size(PK_INT16) + pk_type_size(PK_UINT16), 4);
    assert_int_equal(pk_type_size(PK_INT8) + pk_type_size(PK_BOOL), 2);
    assert_int_equal(pk_type_size((pk_type)0) + pk_type_size((pk_type)11) + pk_type_size((pk_type)-1), 0);
    assert_false(pk_type_is_integer(PK_FLOAT64) || pk_type_is_integer(PK_FLOAT32) ||
                 pk_type_is_integer((pk_type)11));
    for (int type = PK_INT64; type <= PK_BOOL; type++)
        assert_true(pk_type_is_integer((pk_type)type));
    assert_string_equal(pk_type_name(PK_FLOAT32), "float32");
    assert_string_equal(pk_type_name((pk_type)11), "unknown");
}

/* Dictionaries as numpy 2.4.6 writes them:
 *   python -c "import io, numpy as np; f = io.BytesIO(); np.save(f, ARRAY); print(f.getvalue()[10:128])"
 * and variants that its reader takes. */
static void test_reads_numpy(void **state)
{
    static const struct {
        const char *dictionary;
        pk_type type;
        int rank;
        size_t shape[4], items;
    } cases[] = {
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }", PK_FLOAT64, 2, {2, 3}, 6},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", PK_FLOAT32, 1, {3}, 3},
        {"{'descr': '<i8', 'fortran_order': False, 'shape': (), }", PK_INT64, 0, {0}, 1},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1, 3, 1), }", PK_UINT8, 4, {2, 1, 3, 1}, 6},
        {"{'descr': '|i1', 'fortran_order': False, 'shape': (3,), }", PK_INT8, 1, {3}, 3},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (3,), }", PK_INT16, 1, {3}, 3},
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }", PK_INT32, 1, {3}, 3},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }", PK_UINT16, 1, {3}, 3},
        {"{'descr': '<u4', 'fortran_order': False, 'shape': (3,), }", PK_UINT32, 1, {3}, 3},
        {"{'descr': '|b1', 'fortran_order': False, 'shape': (3,), }", PK_BOOL, 1, {3}, 3},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (0, 5), }", PK_FLOAT64, 2, {0, 5}, 0},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (5, 0), }", PK_FLOAT64, 2, {5, 0}, 0},
        {"{'descr': '<f8', 'fortran_order': True, 'shape': (1, 3, 1), }", PK_FLOAT64, 3, {1, 3, 1}, 3},
        {"{'shape':(2L,3L),\"fortran_order\":False,'descr':\"=f8\"}", PK_FLOAT64, 2, {2, 3}, 6},
        {" {'descr' : '<u1' , 'fortran_order' : False , 'shape' : ( 4 , ) } ", PK_UINT8, 1, {4}, 4},
    };
    unsigned char file[512];
    unsigned char data[64] = {1, 2, 3};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int version = 1; version <= 3; version++) {
            pk_array array;
            size_t bytes = cases[i].items * pk_type_size(cases[i].type);
            size_t size = make_npy(file, version, cases[i].dictionary, data, bytes);
            write_file(in_folder("numpy.npy", path), file, size);
            for (unsigned flags = 0; flags <= PK_ARRAY_PARTIAL; flags++) {
                assert_ok(pk_array_map(&context, path, flags, &array));
                assert_int_equal(array.type, cases[i].type);
                assert_int_equal(array.rank, cases[i].rank);
                assert_memory_equal(array.shape, cases[i].shape, sizeof(size_t) * (size_t)array.rank);
                assert_int_equal(pk_array_items(&array), cases[i].items);
                assert_int_equal(pk_array_length(&array), array.rank ? array.shape[0] : 1);
                assert_int_equal(array.extra_bytes, 0);
                assert_non_null(array.mapping);
                assert_int_equal((uintptr_t)array.data % 64, 0);
                if (bytes)
                    assert_memory_equal(array.data, data, bytes);
                pk_array_release(&context, &array);
                assert_null(array.data);
                pk_array_release(&context, &array);
            }
        }
    }
    pk_array_release(&context, NULL);
}

#define DICTIONARY(descr, order, shape) "{'descr': " descr ", 'fortran_order': " order ", 'shape': " shape ", }"
static void test_refuses(void **state)
{
    static const struct {
        const char *dictionary, *words;
        pk_status status;
    } cases[] = {
        {DICTIONARY("'>f8'", "False", "(3,)"), "big-endian ('>f8')", PK_UNSUPPORTED},
        {DICTIONARY("'>i8'", "False", "(3,)"), "big-endian", PK_UNSUPPORTED},
        {DICTIONARY("'<f8'", "True", "(1, 3)"), "takes 24 bytes", PK_FORMAT}, /* the order is no matter there */
        {DICTIONARY("'<f8'", "True", "(2, 3)"), "(2, 3) in Fortran order", PK_UNSUPPORTED},
        {DICTIONARY("'<f2'", "False", "(3,)"), "type <f2", PK_UNSUPPORTED},
        {DICTIONARY("'<u8'", "False", "(3,)"), "type <u8", PK_UNSUPPORTED},
        {DICTIONARY("'<b1'", "False", "(3,)"), "takes 3 bytes", PK_FORMAT},
        {DICTIONARY("'>i4'", "False", "(3,)"), "big-endian", PK_UNSUPPORTED},
        {DICTIONARY("'|i4'", "False", "(3,)"), "type |i4", PK_UNSUPPORTED},
        {DICTIONARY("'<U1'", "False", "(3,)"), "type <U1", PK_UNSUPPORTED},
        {DICTIONARY("'<c16'", "False", "(3,)"), "type <c16", PK_UNSUPPORTED},
        {DICTIONARY("'|O'", "False", "(3,)"), "type |O", PK_UNSUPPORTED},
        {DICTIONARY("''", "False", "(3,)"), "type ", PK_UNSUPPORTED},
        {DICTIONARY("[('a', '<f8'), ('b]', '<i4', [2])]", "False", "(2,)"), "type [('a', '<f8')",
         PK_UNSUPPORTED},
        {DICTIONARY("[('a', '<f8'", "False", "(2,)"), "not NumPy's", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(4611686018427387904,)"), "(4611686018427387904,) overflows",
         PK_OVERFLOW},
        {DICTIONARY("'<f8'", "False", "(4611686018427387904, 0)"), "overflows", PK_OVERFLOW},
        {DICTIONARY("'<f8'", "False", "(0, 4611686018427387904)"), "overflows", PK_OVERFLOW},
        {DICTIONARY("'|u1'", "False", "(4294967296, 4294967296)"), "overflows", PK_OVERFLOW},
        {DICTIONARY("'|u1'", "False", "(18446744073709551616,)"), "overflows", PK_OVERFLOW},
        {DICTIONARY("'|u1'", "False", "(99999999999999999999999999999,)"), "overflows", PK_OVERFLOW},
        {DICTIONARY("'<f8'", "False", "(1152921504606846976,)"), "overflows", PK_OVERFLOW},
        {DICTIONARY("'<f8'", "False", "(576460752303423487,)"), "the file holds 16", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(-2,)"), "negative", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(3,)"), "takes 24 bytes, the file holds 16", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(1,)"), "takes 8 bytes, the file holds 16", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(1, 1, 1, 1, 1, 1, 1, 1, 2)"), "9 dimensions, more than 8",
         PK_UNSUPPORTED},
        {DICTIONARY("'<f8'", "False", "(2)"), "not NumPy's", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(2 3)"), "not NumPy's", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(2.0,)"), "not NumPy's", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "(,)"), "not NumPy's", PK_FORMAT},
        {DICTIONARY("'<f8'", "False", "[2]"), "not NumPy's", PK_FORMAT},
        {DICTIONARY("'<f8'", "0", "(2,)"), "not NumPy's", PK_FORMAT},
        {DICTIONARY("8", "False", "(2,)"), "not NumPy's", PK_FORMAT},
        {"{'descr': '<f8', 'shape': (2,), }", "not NumPy's", PK_FORMAT},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (2,), 'shape': (2,), }", "not NumPy's", PK_FORMAT},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (2,), 'more': 1, }", "not NumPy's", PK_FORMAT},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (2,), } x", "not NumPy's", PK_FORMAT},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (2,), ", "not NumPy's", PK_FORMAT},
        {"{'descr': '<f8', 'fortran_order': False 'shape': (2,)}", "not NumPy's", PK_FORMAT},
        {"{'descr': '<f8", "not NumPy's", PK_FORMAT},
        {"{'descr': '\x1b[31m\n\x80', 'fortran_order': False, 'shape': (2,)}", "type ?[31m??", PK_UNSUPPORTED},
        {"", "not NumPy's", PK_FORMAT},
    };
    unsigned char file[512];
    double data[2] = {1, 2};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        pk_array array, before;
        size_t offset;
        memset(&before, 0x5a, sizeof before);
        array = before;
        size_t size = make_npy(file, 1, cases[i].dictionary, data, sizeof data);
        assert_status(cases[i].status, cases[i].words, parse_npy(&context, file, size, 0, &array, &offset));
        assert_non_null(strstr(pk_message(&context), "x.npy"));
        assert_memory_equal(&array, &before, sizeof array);
        write_file(in_folder("refused.npy", path), file, size);
        assert_status(cases[i].status, "refused.npy", pk_array_map(&context, path, 0, &array));
        assert_int_equal(pk_array_map(NULL, path, 0, &array), cases[i].status);
        assert_memory_equal(&array, &before, sizeof array);
    }
}

static void test_refuses_files(void **state)
{
    pk_array array;
    size_t offset;
    char name[300];
    unsigned char file[256];
    double data[2] = {1, 2};
    (void)state;
    memset(&array, 0, sizeof array);
    assert_status(PK_ARGUMENT, "NULL", pk_array_map(&context, NULL, 0, &array));
    assert_status(PK_ARGUMENT, "NULL", pk_array_map(&context, path, 0, NULL));
    assert_status(PK_IO, "none.npy: cannot be opened",
                  pk_array_map(&context, in_folder("none.npy", path), 0, &array));
    assert_status(PK_IO, "is a directory", pk_array_map(&context, folder, 0, &array));
    assert_status(PK_IO, "a device or a pipe", pk_array_map(&context, "/dev/zero", 0, &array));
    assert_int_equal(mkfifo(in_folder("fifo", path), 0600), 0);
    assert_status(PK_IO, "a device or a pipe", pk_array_map(&context, path, 0, &array)); /* and does not hang */
    write_file(in_folder("empty.npy", path), "", 0);
    assert_status(PK_FORMAT, "is empty", pk_array_map(&context, path, 0, &array));
    /* A path longer than a message: its end and the sentence are there. */
    memset(name, 'a', sizeof name);
    memcpy(name, "/none/", 6);
    memcpy(name + 290, "/end.npy", 9);
    assert_status(PK_IO, "/end.npy: cannot be opened", pk_array_map(&context, name, 0, &array));

    size_t size = make_npy(file, 1, DICTIONARY("'<f8'", "False", "(2,)"), data, sizeof data);
    assert_status(PK_FORMAT, ".npz",
                  parse_npy(&context, (const unsigned char *)"PK\3\4 and more", 14, 0, &array, &offset));
    assert_status(PK_FORMAT, "gzip",
                  parse_npy(&context, (const unsigned char *)"\x1f\x8b and more", 12, 0, &array, &offset));
    assert_status(PK_FORMAT, "is not a .npy",
                  parse_npy(&context, (const unsigned char *)"1,2,3\n", 6, 0, &array, &offset));
    file[6] = 4;
    assert_status(PK_UNSUPPORTED, "version 4.0", parse_npy(&context, file, size, 0, &array, &offset));
    file[6] = 1, file[7] = 1;
    assert_status(PK_UNSUPPORTED, "version 1.1", parse_npy(&context, file, size, 0, &array, &offset));
    file[7] = 0;
    for (int i = 0; i < 2; i++) { /* a header longer than the file; of 4 GB */
        file[6] = i ? 2 : 1;
        memset(file + 8, 0xff, i ? 4 : 2);
        assert_status(PK_FORMAT, i ? "4294967295" : "of 65535",
                      parse_npy(&context, file, size, 0, &array, &offset));
    }
}

/* Cut at every byte: never accepted as whole; as the beginning of a run it gives the whole rows. */
static void test_truncated(void **state)
{
    unsigned char file[512];
    double data[12];
    (void)state;
    for (int i = 0; i < 12; i++)
        data[i] = i;
    size_t size = make_npy(file, 1, DICTIONARY("'<f8'", "False", "(4, 3)"), data, sizeof data),
           header = size - 96;
    for (size_t cut = 0; cut < size; cut++) {
        pk_array array;
        size_t offset;
        assert_status(PK_FORMAT, "x.npy", parse_npy(&context, file, cut, 0, &array, &offset));
        if (cut < header) {
            assert_status(PK_FORMAT, "x.npy",
                          parse_npy(&context, file, cut, PK_ARRAY_PARTIAL, &array, &offset));
            continue;
        }
        write_file(in_folder("cut.npy", path), file, cut);
        assert_ok(pk_array_map(&context, path, PK_ARRAY_PARTIAL, &array));
        assert_int_equal(array.shape[0], (cut - header) / 24);
        assert_int_equal(array.extra_bytes, (cut - header) % 24);
        if (array.shape[0])
            assert_memory_equal(array.data, data, array.shape[0] * 24);
        pk_array_release(&context, &array);
    }
    /* A scalar has no rows: it is there or not. */
    size = make_npy(file, 1, DICTIONARY("'<f8'", "False", "()"), data, 8);
    pk_array array;
    size_t offset;
    assert_ok(parse_npy(&context, file, size, PK_ARRAY_PARTIAL, &array, &offset));
    assert_status(PK_FORMAT, "takes 8", parse_npy(&context, file, size - 1, PK_ARRAY_PARTIAL, &array, &offset));
}

/* Data that no item may be read from in place is copied. */
static void test_misaligned(void **state)
{
    unsigned char file[256];
    const char *dictionary = "{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}";
    double data[3] = {1.5, -2.5, 1e300};
    (void)state;
    for (size_t extra = 0; extra < 9; extra++) {
        pk_array array;
        size_t length = strlen(dictionary) + extra;
        memcpy(file, "\x93NUMPY\1\0", 8);
        file[8] = (unsigned char)length;
        file[9] = 0;
        memset(file + 10, ' ', length);
        memcpy(file + 10, dictionary, strlen(dictionary));
        memcpy(file + 10 + length, data, sizeof data);
        write_file(in_folder("misaligned.npy", path), file, 10 + length + sizeof data);
        assert_ok(pk_array_map(&context, path, 0, &array));
        assert_int_equal((uintptr_t)array.data % 8, 0);
        assert_true(((10 + length) % 8 == 0) == (array.owned == NULL));
        assert_memory_equal(array.data, data, sizeof data);
        pk_array_release(&context, &array);
    }
}

static void test_views(void **state)
{
    int64_t data[24];
    size_t shape[3] = {4, 3, 2}, many[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, huge[2] = {(size_t)1 << 62, 8};
    pk_real out[24];
    (void)state;
    for (int i = 0; i < 24; i++)
        data[i] = i - 5;
    pk_array array = pk_array_view(PK_INT64, 3, shape, data);
    assert_int_equal(array.row_items, 6);
    assert_int_equal(pk_array_items(&array), 24);
    pk_array rows = pk_array_rows(&array, 1, 2);
    assert_true(rows.data == data + 6 && rows.shape[0] == 2 && rows.shape[1] == 3 && rows.row_items == 6);
    pk_array_reals(&rows, 3, 9, out);
    for (int i = 0; i < 9; i++)
        assert_true(out[i] == 4 + i);
    pk_array_reals(&rows, 0, 0, NULL);
    assert_int_equal(pk_array_view(PK_INT64, 9, many, data).type, 0);
    assert_int_equal(pk_array_view(PK_INT64, -1, many, data).type, 0);
    assert_int_equal(pk_array_view((pk_type)11, 1, many, data).type, 0);
    assert_int_equal(pk_array_view(PK_INT64, 2, huge, data).type, 0);
    assert_int_equal(pk_array_view(PK_UINT8, 0, NULL, data).row_items, 1);
    pk_array none;
    memset(&none, 0, sizeof none);
    assert_int_equal(pk_array_items(&none), 0);

    double doubles[3] = {0.1, -1e300, 5e-324};
    float floats[3] = {0.1f, -1e30f, 1e-45f};
    unsigned char bytes[3] = {0, 128, 255};
    size_t three = 3;
    pk_array from[3] = {pk_array_view(PK_FLOAT64, 1, &three, doubles),
                        pk_array_view(PK_FLOAT32, 1, &three, floats),
                        pk_array_view(PK_UINT8, 1, &three, bytes)};
    for (int i = 0; i < 2; i++) {
        pk_array_reals(&from[1], (size_t)i, 2, out);
        assert_true(out[0] == (pk_real)floats[i] && out[1] == (pk_real)floats[i + 1]);
        pk_array_reals(&from[2], (size_t)i, 2, out);
        assert_true(out[0] == bytes[i] && out[1] == bytes[i + 1]);
    }
    pk_array_reals(&from[0], 2, 1, out);
    assert_true(out[0] == (pk_real)doubles[2]);
}

static void test_integers(void **state)
{
    static const int64_t i64[2] = {INT64_MIN, INT64_MAX};
    static const int32_t i32[2] = {INT32_MIN, INT32_MAX};
    static const int16_t i16[2] = {INT16_MIN, INT16_MAX};
    static const int8_t i8[2] = {INT8_MIN, INT8_MAX};
    static const uint32_t u32[2] = {0, UINT32_MAX};
    static const uint16_t u16[2] = {0, UINT16_MAX};
    static const uint8_t u8[2] = {0, UINT8_MAX}, bools[2] = {0, 1};
    const struct {
        pk_type type;
        const void *data;
        int64_t least, most;
    } cases[] = {{PK_INT64, i64, INT64_MIN, INT64_MAX}, {PK_INT32, i32, INT32_MIN, INT32_MAX},
                 {PK_INT16, i16, INT16_MIN, INT16_MAX}, {PK_INT8, i8, INT8_MIN, INT8_MAX},
                 {PK_UINT32, u32, 0, UINT32_MAX},       {PK_UINT16, u16, 0, UINT16_MAX},
                 {PK_UINT8, u8, 0, UINT8_MAX},          {PK_BOOL, bools, 0, 1}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t two = 2;
        const pk_array array = pk_array_view(cases[i].type, 1, &two, cases[i].data);
        int64_t out[2];
        pk_real reals[2];
        pk_array_integers(&array, 0, 2, out);
        assert_true(out[0] == cases[i].least && out[1] == cases[i].most);
        pk_array_integers(&array, 1, 1, out);
        assert_true(out[0] == cases[i].most);
        pk_array_reals(&array, 0, 2, reals);
        assert_true(reals[0] == (pk_real)cases[i].least && reals[1] == (pk_real)cases[i].most);
    }
}

/* Every order of the axes of a shape, with ones anywhere: only the shape's own order fits, and a row of plain numbers. */
static void test_axes(void **state)
{
    static const struct {
        int rank;
        size_t dims[4];
        int rows_rank;
        size_t rows[6];
        int fits; /* 1; 0: as many numbers, in another order; -1: other numbers */
    } cases[] = {
        {3, {1, 8, 6}, 3, {5, 8, 6}, 1},
        {3, {1, 8, 6}, 4, {5, 1, 8, 6}, 1},
        {3, {1, 8, 6}, 4, {5, 8, 6, 1}, 1},
        {3, {1, 8, 6}, 4, {5, 8, 1, 6}, 1},
        {3, {1, 8, 6}, 2, {5, 48}, 1},
        {3, {1, 8, 6}, 3, {5, 1, 48}, 1},
        {3, {1, 8, 6}, 3, {5, 6, 8}, 0},
        {3, {1, 8, 6}, 4, {5, 6, 8, 1}, 0},
        {3, {1, 8, 6}, 3, {5, 4, 12}, 0},
        {3, {1, 8, 6}, 4, {5, 2, 4, 6}, 0},
        {3, {3, 8, 8}, 4, {5, 3, 8, 8}, 1},
        {3, {3, 8, 8}, 4, {5, 8, 8, 3}, 0},
        {3, {3, 8, 8}, 4, {5, 8, 3, 8}, 0},
        {3, {3, 8, 8}, 3, {5, 3, 64}, 0},
        {3, {3, 8, 8}, 2, {5, 192}, 1},
        {3, {3, 8, 8}, 4, {5, 3, 8, 7}, -1},
        {3, {3, 8, 8}, 5, {5, 1, 3, 8, 8}, 1},
        {2, {4, 12}, 3, {5, 12, 4}, 0},
        {1, {48}, 3, {5, 8, 6}, 1},
        {1, {48}, 2, {5, 48}, 1},
        {1, {48}, 2, {48, 5}, -1},
        {1, {1}, 1, {5}, 1},
        {1, {1}, 3, {5, 1, 1}, 1},
        {1, {48}, 1, {48}, -1},
        {3, {1, 1, 1}, 1, {5}, 1},
        {3, {2, 2, 2}, 4, {5, 2, 2, 2}, 1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const pk_array array = pk_array_view(PK_FLOAT64, cases[i].rows_rank, cases[i].rows, NULL);
        pk_status status = pk_array_check_rows(&context, &array, cases[i].rank, cases[i].dims, "x.npy");
        if (status != (cases[i].fits > 0 ? PK_OK : PK_SHAPE) ||
            (status != PK_OK && !strstr(pk_message(&context), cases[i].fits ? "rows of" : "another order")))
            fail_msg("case %zu: status %d, '%s'", i, (int)status, pk_message(&context));
    }
    pk_array none;
    memset(&none, 0, sizeof none);
    assert_status(PK_ARGUMENT, "no array", pk_array_check_rows(&context, &none, 1, cases[0].dims, "x.npy"));
}

/* ---- .npy: writing ---- */

/* Our headers are those of numpy.save 2.4.6, which leaves room for the first dimension to grow. */
static void test_write(void **state)
{
    static const struct {
        pk_type type;
        int rank;
        size_t shape[PK_ARRAY_RANK];
        const char *dictionary;
    } cases[] = {
        {PK_FLOAT64, 2, {2, 3}, DICTIONARY("'<f8'", "False", "(2, 3)")},
        {PK_FLOAT32, 1, {3}, DICTIONARY("'<f4'", "False", "(3,)")},
        {PK_INT64, 0, {0}, DICTIONARY("'<i8'", "False", "()")},
        {PK_UINT8, 4, {2, 1, 3, 1}, DICTIONARY("'|u1'", "False", "(2, 1, 3, 1)")},
        {PK_FLOAT64, 2, {0, 5}, DICTIONARY("'<f8'", "False", "(0, 5)")},
        {PK_INT32, 1, {3}, DICTIONARY("'<i4'", "False", "(3,)")},
        {PK_BOOL, 1, {3}, DICTIONARY("'|b1'", "False", "(3,)")},
        {PK_UINT8, 8, {1, 1, 2, 1, 1, 2, 1, 2}, DICTIONARY("'|u1'", "False", "(1, 1, 2, 1, 1, 2, 1, 2)")},
    };
    unsigned char data[64];
    (void)state;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)(i * 7);
    in_folder("written.npy", path);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        pk_array array;
        size_t size;
        assert_ok(pk_array_write(&context, path, cases[i].type, cases[i].rank, cases[i].shape, data));
        unsigned char *bytes = read_file(path, &size);
        assert_memory_equal(bytes, "\x93NUMPY\1\0\x76\0", 10);
        assert_memory_equal(bytes + 10, cases[i].dictionary, strlen(cases[i].dictionary));
        for (size_t k = 10 + strlen(cases[i].dictionary); k < 127; k++)
            assert_int_equal(bytes[k], ' ');
        assert_int_equal(bytes[127], '\n');
        free(bytes);
        assert_ok(pk_array_map(&context, path, 0, &array));
        assert_int_equal(array.rank, cases[i].rank);
        assert_memory_equal(array.shape, cases[i].shape, sizeof array.shape);
        assert_int_equal(size, 128 + pk_array_items(&array) * pk_type_size(array.type));
        if (size > 128)
            assert_memory_equal(array.data, data, size - 128);
        pk_array_release(&context, &array);
    }
    size_t shape[2] = {3, 2}, huge[2] = {(size_t)1 << 62, 8};
    assert_status(PK_ARGUMENT, "NULL", pk_array_write(&context, NULL, PK_UINT8, 2, shape, data));
    assert_status(PK_ARGUMENT, "rank 9", pk_array_write(&context, path, PK_UINT8, 9, shape, data));
    assert_status(PK_ARGUMENT, "rank -1", pk_array_write(&context, path, PK_UINT8, -1, shape, data));
    assert_status(PK_ARGUMENT, "type 11", pk_array_write(&context, path, (pk_type)11, 2, shape, data));
    assert_status(PK_ARGUMENT, "NULL", pk_array_write(&context, path, PK_UINT8, 2, shape, NULL));
    assert_status(PK_OVERFLOW, "overflows", pk_array_write(&context, path, PK_UINT8, 2, huge, data));
    char inside[340];
    snprintf(inside, sizeof inside, "%s/none/x.npy", folder);
    assert_status(PK_IO, "x.npy.tmp: cannot be made",
                  pk_array_write(&context, inside, PK_UINT8, 2, shape, data));
    /* A failure leaves the old file, and nothing aside. */
    assert_int_equal(mkdir(in_folder("busy.npy", path2), 0700), 0);
    snprintf(inside, sizeof inside, "%s/full", path2);
    write_file(inside, "x", 1);
    assert_status(PK_IO, "cannot be written", pk_array_write(&context, path2, PK_UINT8, 2, shape, data));
    snprintf(inside, sizeof inside, "%s.tmp", path2);
    assert_int_equal(access(inside, F_OK), -1);
}

/* The row count in the header, which may lag. */
static size_t header_rows(const char *full)
{
    size_t size;
    unsigned char *bytes = read_file(full, &size);
    assert_true(size >= 128);
    bytes[127] = 0;
    const char *shape = strstr((const char *)bytes + 10, "'shape': (");
    assert_non_null(shape);
    size_t rows = (size_t)strtoull(shape + 10, NULL, 10);
    free(bytes);
    return rows;
}

static void test_append(void **state)
{
    enum { ROWS = 600 };
    static double data[ROWS * 3];
    pk_array_writer writer, other;
    size_t row_shape[1] = {3};
    pk_array array;
    (void)state;
    for (int i = 0; i < ROWS * 3; i++)
        data[i] = i + 0.25;
    in_folder("grown.npy", path);
    memset(&writer, 0, sizeof writer);
    assert_ok(pk_array_close(&context, &writer));
    assert_ok(pk_array_close(&context, NULL));
    assert_status(PK_ARGUMENT, "closed", pk_array_append(&context, &writer, 1, data));
    assert_status(PK_ARGUMENT, "closed", pk_array_flush(&context, &writer));
    assert_ok(pk_array_create(&context, path, PK_FLOAT64, 2, row_shape, &writer));
    assert_ok(pk_array_map(&context, path, 0, &array)); /* (0, 3), already whole */
    assert_int_equal(array.shape[0], 0);
    pk_array_release(&context, &array);
    for (size_t i = 0; i < ROWS; i++) {
        assert_ok(pk_array_append(&context, &writer, 1, data + 3 * i));
        assert_int_equal(writer.rows, i + 1);
        assert_int_equal(file_size(path), 128 + 24 * (i + 1));
        if (i % 50 == 0) {
            assert_ok(pk_array_map(&context, path, PK_ARRAY_PARTIAL, &array));
            assert_int_equal(array.shape[0], i + 1);
            assert_memory_equal(array.data, data, 24 * (i + 1));
            pk_array_release(&context, &array);
            assert_true(header_rows(path) == i / 256 * 256);
        }
    }
    assert_status(PK_FORMAT, "the file holds", pk_array_map(&context, path, 0, &array));
    assert_int_equal(header_rows(path), 512);
    assert_ok(pk_array_flush(&context, &writer));
    assert_int_equal(header_rows(path), ROWS);
    assert_ok(pk_array_append(&context, &writer, 0, NULL));
    assert_status(PK_ARGUMENT, "NULL", pk_array_append(&context, &writer, 1, NULL));
    assert_status(PK_OVERFLOW, "overflow", pk_array_append(&context, &writer, SIZE_MAX / 8, data));
    assert_ok(pk_array_append(&context, &writer, 2, data));
    assert_ok(pk_array_close(&context, &writer));
    assert_int_equal(writer.file, 0);
    assert_ok(pk_array_map(&context, path, 0, &array));
    assert_int_equal(array.shape[0], ROWS + 2);
    assert_memory_equal((const double *)array.data + 3 * ROWS, data, 48);
    pk_array_release(&context, &array);

    memset(&other, 0x5a, sizeof other);
    memset(&writer, 0x5a, sizeof writer);
    size_t wide[1] = {4}, none[1] = {0}, huge[2] = {(size_t)1 << 40, (size_t)1 << 40};
    assert_status(PK_SHAPE, "holds (602, 3) float64, wanted for appending: (1, 4) float64",
                  pk_array_reopen(&context, path, PK_FLOAT64, 2, wide, 1, &writer));
    assert_status(PK_SHAPE, "float32", pk_array_reopen(&context, path, PK_FLOAT32, 2, row_shape, 1, &writer));
    assert_status(PK_SHAPE, "(1,)", pk_array_reopen(&context, path, PK_FLOAT64, 1, NULL, 1, &writer));
    assert_status(PK_SHAPE, "(603, 3)",
                  pk_array_reopen(&context, path, PK_FLOAT64, 2, row_shape, 603, &writer));
    assert_status(PK_SHAPE, "without items", pk_array_create(&context, path, PK_FLOAT64, 2, none, &writer));
    assert_status(PK_OVERFLOW, "overflows", pk_array_create(&context, path, PK_FLOAT64, 3, huge, &writer));
    assert_status(PK_ARGUMENT, "rank 0", pk_array_create(&context, path, PK_FLOAT64, 0, row_shape, &writer));
    assert_status(PK_ARGUMENT, "rank 9", pk_array_create(&context, path, PK_FLOAT64, 9, row_shape, &writer));
    assert_status(PK_ARGUMENT, "NULL", pk_array_create(&context, path, PK_FLOAT64, 2, NULL, &writer));
    assert_status(PK_IO, "cannot be made",
                  pk_array_create(&context, folder, PK_FLOAT64, 2, row_shape, &writer));
    assert_status(PK_IO, "directory", pk_array_reopen(&context, folder, PK_FLOAT64, 2, row_shape, 0, &writer));
    assert_memory_equal(&writer, &other, sizeof writer);
    assert_int_equal(file_size(path), 128 + 24 * (ROWS + 2)); /* none of these touched it */
}

/* A file that was cut anywhere is reopened at any of its whole rows, and grows again. */
static void test_reopen(void **state)
{
    unsigned char file[512];
    float data[20];
    size_t row_shape[1] = {5};
    (void)state;
    for (int i = 0; i < 20; i++)
        data[i] = (float)i;
    in_folder("reopened.npy", path);
    /* A header that runs ahead of the data, and one that lags behind. */
    for (int ahead = 0; ahead < 2; ahead++) {
        size_t size = make_npy(file, ahead ? 2 : 1,
                               ahead ? DICTIONARY("'<f4'", "False", "(1000, 5)") "                   "
                                     : DICTIONARY("'<f4'", "False", "(1, 5)") "                      ",
                               data, sizeof data);
        for (size_t cut = size - sizeof data; cut <= size; cut += 3) {
            size_t whole = (cut - (size - sizeof data)) / 20;
            for (size_t rows = 0; rows <= whole + 1; rows++) {
                pk_array_writer writer;
                pk_array array;
                write_file(path, file, cut);
                pk_status status = pk_array_reopen(&context, path, PK_FLOAT32, 2, row_shape, rows, &writer);
                if (rows > whole) {
                    assert_status(PK_SHAPE, "reopened.npy", status);
                    assert_int_equal(file_size(path), cut);
                    continue;
                }
                assert_ok(status);
                assert_int_equal(writer.rows, rows);
                assert_ok(pk_array_map(&context, path, 0, &array)); /* whole at once */
                assert_int_equal(array.shape[0], rows);
                pk_array_release(&context, &array);
                assert_ok(pk_array_append(&context, &writer, 4 - rows, data + 5 * rows));
                assert_ok(pk_array_close(&context, &writer));
                assert_ok(pk_array_map(&context, path, 0, &array));
                assert_int_equal(array.shape[0], 4);
                assert_memory_equal(array.data, data, sizeof data);
                pk_array_release(&context, &array);
            }
        }
    }
    /* A header without room for the count of rows stays as it is. */
    pk_array_writer writer;
    const char *tight = "{'descr':'<f4','fortran_order':False,'shape':(4,5)}";
    memcpy(file, "\x93NUMPY\1\0", 8);
    file[8] = (unsigned char)strlen(tight);
    file[9] = 0;
    memcpy(file + 10, tight, strlen(tight));
    memcpy(file + 10 + strlen(tight), data, sizeof data);
    write_file(path, file, 10 + strlen(tight) + sizeof data);
    assert_status(PK_UNSUPPORTED, "no room",
                  pk_array_reopen(&context, path, PK_FLOAT32, 2, row_shape, 4, &writer));
    assert_int_equal(file_size(path), 10 + strlen(tight) + sizeof data);
}

/* The writer of a child that is killed: whatever append had returned is there. */
static void test_kill(void **state)
{
    enum { WIDTH = 700 }; /* rows that straddle pages */
    (void)state;
    for (int round = 0; round < 8; round++) {
        int pipes[2], told = -1, last = -1;
        size_t row_shape[1] = {WIDTH};
        char name[40];
        snprintf(name, sizeof name, "killed%d.npy", round);
        in_folder(name, path);
        assert_int_equal(pipe(pipes), 0);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            static int64_t row[WIDTH];
            pk_array_writer writer;
            if (pk_array_create(NULL, path, PK_INT64, 2, row_shape, &writer) != PK_OK)
                _exit(1);
            for (int i = 0;; i++) {
                for (int k = 0; k < WIDTH; k++)
                    row[k] = (int64_t)i * WIDTH + k;
                if (pk_array_append(NULL, &writer, 1, row) != PK_OK ||
                    write(pipes[1], &i, sizeof i) != sizeof i)
                    _exit(1);
            }
        }
        close(pipes[1]);
        while (told < 40 * round && read(pipes[0], &told, sizeof told) == sizeof told)
            continue;
        assert_int_equal(kill(child, SIGKILL), 0);
        int status;
        assert_true(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
        while (read(pipes[0], &last, sizeof last) == sizeof last)
            told = last;
        close(pipes[0]);
        pk_array array;
        assert_ok(pk_array_map(&context, path, PK_ARRAY_PARTIAL, &array));
        assert_true(array.shape[0] >= (size_t)(told + 1) && array.shape[0] <= (size_t)(told + 2));
        for (size_t i = 0; i < pk_array_items(&array); i++)
            assert_true(((const int64_t *)array.data)[i] == (int64_t)i);
        assert_true(header_rows(path) <= array.shape[0]); /* np.load can read it */
        pk_array_release(&context, &array);
        assert_int_equal(unlink(path), 0);
    }
}

/* What a full disk does, whatever makes it full. The file has room for the header and rows rows. */
static void fill_up(const char *full, size_t rows)
{
    enum { WIDTH = 1000 };
    static double row[3 * WIDTH];
    size_t row_shape[1] = {WIDTH}, shape[2] = {rows + 2, WIDTH};
    pk_array_writer writer;
    pk_array array;
    for (int i = 0; i < 3 * WIDTH; i++)
        row[i] = i;
    assert_ok(pk_array_create(&context, full, PK_FLOAT64, 2, row_shape, &writer));
    for (size_t i = 0; i + 1 < rows; i++)
        assert_ok(pk_array_append(&context, &writer, 1, row));
    for (int again = 0; again < 2;
         again++) { /* three rows of which one fits: cut off, and the writer goes on */
        assert_status(PK_IO, "3 rows of 8000 bytes cannot be appended to",
                      pk_array_append(&context, &writer, 3, row));
        assert_int_equal(writer.rows, rows - 1);
        assert_int_equal(file_size(full), 128 + 8000 * (rows - 1));
    }
    assert_ok(pk_array_append(&context, &writer, 1, row));
    assert_status(PK_IO, "cannot be appended", pk_array_append(&context, &writer, 1, row));
    assert_ok(pk_array_close(&context, &writer));
    assert_ok(pk_array_map(&context, full, 0, &array));
    assert_int_equal(array.shape[0], rows);
    assert_memory_equal((const double *)array.data + WIDTH * (rows - 1), row, 8000);
    pk_array_release(&context, &array);
    double *large = (double *)calloc(shape[0] * WIDTH, sizeof *large);
    assert_non_null(large);
    char aside[360];
    snprintf(aside, sizeof aside, "%s.tmp", full);
    assert_status(PK_IO, "cannot be written", pk_array_write(&context, full, PK_FLOAT64, 2, shape, large));
    free(large);
    assert_int_equal(access(aside, F_OK), -1);
    assert_ok(pk_array_map(&context, full, 0, &array)); /* as before */
    assert_int_equal(array.shape[0], rows);
    pk_array_release(&context, &array);
}

static void test_file_size_limit(void **state)
{
    struct rlimit before, small;
    (void)state;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = before;
    small.rlim_cur = 128 + 5 * 8000 + 4001; /* half a row more */
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    fill_up(in_folder("limited.npy", path), 5);
    small.rlim_cur = 100; /* not even the header */
    pk_array_writer writer;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_status(PK_IO, "cannot be written",
                  pk_array_create(&context, in_folder("limited2.npy", path), PK_FLOAT64, 1, NULL, &writer));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, handler);
}

/* A real full disk, where a small one can be mounted. */
static void test_full_disk(void **state)
{
    (void)state;
#ifdef __linux__
    char file[340];
    assert_int_equal(mkdir(in_folder("disk", path2), 0700), 0);
    if (mount("tmpfs", path2, "tmpfs", 0, "size=65536") != 0) {
        print_message("skipped: a tmpfs cannot be mounted: %s\n", strerror(errno));
        skip();
    }
    snprintf(file, sizeof file, "%s/full.npy", path2);
    fill_up(file, 8); /* 16 pages hold 8.2 rows */
    assert_int_equal(umount(path2), 0);
#else
    print_message("skipped: mounting a small disk is written for Linux\n");
    skip();
#endif
}

/* ---- memory ---- */

static pk_status call_write(pk_context *with, made *out)
{
    size_t shape[2] = {2, 3};
    (void)out;
    return pk_array_write(with, in_folder("small.npy", path), PK_UINT8, 2, shape, "abcdef");
}

static pk_status call_map(pk_context *with, made *out)
{
    pk_status status = pk_array_map(with, in_folder("odd.npy", path), 0, &out->array);
    if (status == PK_OK)
        pk_array_release(with, &out->array);
    return status;
}

static void test_memory(void **state)
{
    unsigned char file[200];
    const char *dictionary = "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}";
    (void)state;
    memcpy(file, "\x93NUMPY\1\0", 8);
    file[8] = (unsigned char)strlen(dictionary);
    file[9] = 0;
    memcpy(file + 10, dictionary, strlen(dictionary));
    memset(file + 10 + strlen(dictionary), 0, 8);
    assert_true((10 + strlen(dictionary)) % 8 != 0); /* misaligned, so it is copied */
    write_file(in_folder("odd.npy", path), file, 18 + strlen(dictionary));
    check_allocations(call_write, 1);
    check_allocations(call_map, 1);
}

/* ---- where files are opened ---- */

/* In a process without standard input, output and error, no file takes their places: what is printed stays out of them. */
static void test_closed_descriptors(void **state)
{
    static const char noise[] = "what a program prints";
    const size_t two = 2, shape[2] = {1, 2};
    const double row[2] = {1, 2};
    (void)state;
    for (int closed = 1; closed < 8; closed++) {
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            pk_array_writer writer;
            pk_array array;
            int wrong = 0;
            memset(&writer, 0, sizeof writer);
            for (int i = 0; i < 3; i++)
                if (closed >> i & 1)
                    close(i);
            for (int again = 0; again < 2; again++) {
                wrong |=
                    again ? pk_array_reopen(NULL, in_folder("grown.npy", path), PK_FLOAT64, 2, &two, 1, &writer)
                          : pk_array_create(NULL, in_folder("grown.npy", path), PK_FLOAT64, 2, &two, &writer);
                for (int i = 0; i < 3; i++)
                    wrong |= (closed >> i & 1) && write(i, noise, sizeof noise) >= 0;
                wrong |= pk_array_append(NULL, &writer, 1, row);
                wrong |= pk_array_close(NULL, &writer);
            }
            wrong |= pk_array_write(NULL, in_folder("whole.npy", path), PK_FLOAT64, 2, shape, row);
            wrong |= pk_array_open(NULL, path, 0, &array);
            wrong |= array.file - 1 <= 2;
            _exit(wrong);
        }
        int status = 0;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        pk_array array;
        assert_ok(pk_array_map(&context, in_folder("grown.npy", path), 0, &array));
        assert_int_equal(array.shape[0], 2);
        assert_memory_equal(array.data, row, sizeof row);
        assert_memory_equal((const char *)array.data + sizeof row, row, sizeof row);
        pk_array_release(&context, &array);
    }
}

/* Links, pipes, devices and directories in the place of a file that is to be written: refused at once, untouched. */
static void test_no_files(void **state)
{
    static const char victim[] = "somebody's letters";
    const size_t two = 2, shape[2] = {1, 2};
    const double row[2] = {1, 2};
    char place[300], other[300], text[sizeof victim];
    (void)state;
    for (int kind = 0; kind < 6; kind++) {
        static const char *const says[] = {"a symbolic link",    "a symbolic link", "a device or a pipe",
                                           "a device or a pipe", "directory",       "a symbolic link"};
        for (int way = 0; way < 3; way++) {
            pk_array_writer writer;
            int reader = -1;
            in_folder(way == 2 ? "place.npy.tmp" : "place.npy", place);
            write_file(in_folder("victim", other), victim, sizeof victim);
            if (kind == 0)
                assert_int_equal(symlink(other, place), 0);
            else if (kind == 1)
                assert_int_equal(symlink("nowhere", place), 0);
            else if (kind == 2 || kind == 3)
                assert_int_equal(mkfifo(place, 0600), 0);
            else if (kind == 4)
                assert_int_equal(mkdir(place, 0700), 0);
            else
                assert_int_equal(symlink("/dev/null", place), 0);
            if (kind == 3) { /* somebody listens */
                reader = open(place, O_RDONLY | O_NONBLOCK);
                assert_true(reader >= 0);
            }
            in_folder("place.npy", path);
            if (way == 0)
                assert_status(PK_IO, says[kind], pk_array_create(&context, path, PK_FLOAT64, 2, &two, &writer));
            else if (way == 1 && kind != 0 && kind != 1 && kind != 5) /* a run may be read through a link */
                assert_status(PK_IO, says[kind],
                              pk_array_reopen(&context, path, PK_FLOAT64, 2, &two, 0, &writer));
            else if (way == 2)
                assert_status(PK_IO, says[kind], pk_array_write(&context, path, PK_FLOAT64, 2, shape, row));
            if (reader >= 0)
                close(reader);
            if (kind == 4)
                assert_int_equal(rmdir(place), 0);
            else
                assert_int_equal(unlink(place), 0);
            FILE *file = fopen(other, "rb");
            assert_non_null(file);
            assert_int_equal(fread(text, 1, sizeof text, file), sizeof victim);
            fclose(file);
            assert_memory_equal(text, victim, sizeof victim);
            assert_int_equal(access(in_folder("nowhere", path2), F_OK), -1);
        }
    }
    /* Through a link a file is read, but not appended to. */
    pk_array_writer writer;
    assert_ok(pk_array_write(&context, in_folder("real.npy", path), PK_FLOAT64, 2, shape, row));
    assert_int_equal(symlink("real.npy", in_folder("link.npy", path2)), 0);
    pk_array array;
    assert_ok(pk_array_map(&context, path2, 0, &array));
    pk_array_release(&context, &array);
    assert_status(PK_IO, "a symbolic link", pk_array_reopen(&context, path2, PK_FLOAT64, 2, &two, 1, &writer));
    assert_int_equal(unlink(path2), 0);
}

/* A header that was replaced up to any byte: the rows are there, and np.load's reader still understands it. */
static void test_torn_header(void **state)
{
    const size_t two = 2;
    static const double rows[2 * 1100];
    unsigned char before[256], after[256];
    pk_array_writer writer;
    (void)state;
    memset(&writer, 0, sizeof writer);
    assert_ok(pk_array_create(&context, in_folder("torn.npy", path), PK_FLOAT64, 2, &two, &writer));
    size_t counts[] = {9, 10, 99, 1000, 1099};
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
        const size_t header = writer.header_bytes;
        int file = open(path, O_RDWR);
        assert_true(file >= 0 && header <= sizeof before);
        assert_int_equal(pread(file, before, header, 0), header);
        assert_ok(pk_array_append(&context, &writer, counts[c] - writer.rows, rows));
        assert_ok(pk_array_flush(&context, &writer));
        assert_int_equal(pread(file, after, header, 0), header);
        for (size_t torn = 0; torn <= header; torn++) {
            pk_array array;
            assert_int_equal(pwrite(file, after, torn, 0), torn);
            assert_int_equal(pwrite(file, before + torn, header - torn, (off_t)torn), header - torn);
            assert_ok(pk_array_map(&context, path, PK_ARRAY_PARTIAL, &array));
            assert_int_equal(array.shape[0], counts[c]);
            assert_int_equal(array.extra_bytes, 0);
            pk_array_release(&context, &array);
        }
        close(file);
    }
    assert_ok(pk_array_close(&context, &writer));
}

/* Items read from a file that is open: the same as mapped ones, and an error where it has become shorter. */
static void test_read(void **state)
{
    enum { ITEMS = 3000 };
    static double doubles[ITEMS];
    static int16_t integers[ITEMS];
    static pk_real out[ITEMS];
    const size_t shape[2] = {ITEMS / 3, 3};
    (void)state;
    for (int i = 0; i < ITEMS; i++)
        integers[i] = (int16_t)(7 * i), doubles[i] = integers[i];
    assert_ok(pk_array_write(&context, in_folder("doubles.npy", path), PK_FLOAT64, 2, shape, doubles));
    assert_ok(pk_array_write(&context, in_folder("integers.npy", path2), PK_INT16, 2, shape, integers));
    for (int way = 0; way < 4; way++) {
        pk_array array;
        const char *name = way & 1 ? path2 : path;
        assert_ok(way < 2 ? pk_array_open(&context, name, 0, &array)
                          : pk_array_map(&context, name, PK_ARRAY_KEEP_OPEN, &array));
        assert_int_equal(array.data != NULL, way >= 2);
        assert_int_equal(context.memory_used, 0);
        assert_ok(pk_array_read(&context, &array, 0, ITEMS, out));
        for (int i = 0; i < ITEMS; i++)
            assert_true(out[i] == (pk_real)doubles[i]);
        assert_ok(pk_array_read(&context, &array, 1234, 700, out));
        for (int i = 0; i < 700; i++)
            assert_true(out[i] == (pk_real)doubles[1234 + i]);
        assert_ok(pk_array_read(&context, &array, ITEMS, 0, NULL));
        if (way >= 2) {
            assert_int_equal(truncate(name, 300), 0);
            assert_status(PK_IO, "became shorter", pk_array_read(&context, &array, 0, ITEMS, out));
            assert_ok(pk_array_read(&context, &array, 0, 20, out));
        }
        pk_array_release(&context, &array);
    }
    pk_array array;
    assert_status(PK_ARGUMENT, "NULL", pk_array_open(&context, NULL, 0, &array));
    assert_status(PK_FORMAT, "takes", pk_array_open(&context, path, 0, &array));
    assert_status(PK_IO, "cannot be opened", pk_array_open(&context, in_folder("none.npy", path), 0, &array));
    assert_status(PK_IO, "a device or a pipe", pk_array_open(&context, "/dev/zero", 0, &array));
}

/* ---- the program ---- */

static int leave(void **state)
{
#ifdef __linux__
    (void)umount(in_folder("disk", path)); /* where test_full_disk failed */
#endif
    return tear_down(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_reads_numpy),
        cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_refuses_files),
        cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_misaligned),
        cmocka_unit_test(test_views),
        cmocka_unit_test(test_integers),
        cmocka_unit_test(test_axes),
        cmocka_unit_test(test_write),
        cmocka_unit_test(test_append),
        cmocka_unit_test(test_reopen),
        cmocka_unit_test(test_kill),
        cmocka_unit_test(test_file_size_limit),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_closed_descriptors),
        cmocka_unit_test(test_no_files),
        cmocka_unit_test(test_torn_header),
        cmocka_unit_test(test_read),
    };
    int before = first_free_descriptor();
    int failed = cmocka_run_group_tests(tests, set_up, leave);
    if (first_free_descriptor() != before) {
        print_error("a file was left open\n");
        failed++;
    }
    return failed;
}
