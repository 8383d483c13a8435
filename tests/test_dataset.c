/* Data sets: what CSV and IDX files hold, or the line and column that is wrong; whether data fit a network;
 * numbers as text. */
#define UNDER_TEST "pathkernel/run/run.h"
#include "files.h"
#include <locale.h>
#include <math.h>

/* ---- numbers ---- */

static uint64_t bits_of(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static void test_numbers(void **state)
{
    static const char *const good[] = {"0",
                                       "-0",
                                       "1",
                                       "+1.5",
                                       ".5",
                                       "5.",
                                       "1e5",
                                       "1E+05",
                                       "-1.25e-3",
                                       "123456789012345678",
                                       "9007199254740993",
                                       "9007199254740992",
                                       "0.1",
                                       "1e22",
                                       "1e23",
                                       "1e-22",
                                       "1e-23",
                                       "5e-324",
                                       "1e-400",
                                       "1.7976931348623157e308",
                                       "000000000000000000000000000001",
                                       "0.000000000000000000000000000000000001",
                                       "2.2250738585072011e-308",
                                       "179769313486231570000000000000000000000e270",
                                       "0e99999999999999999999",
                                       "8.9255000000000001e-1",
                                       "9007199254740993e-5",
                                       "90071992547409925e-1"};
    static const char *const bad[] = {
        "",      "-",     "+",  ".",  "e5",  "1e",  "1e+",   "1x",    "nan",   "inf",
        "-inf",  "0x10",  "1 ", " 1", "1,5", "--1", "1.2.3", "1e5.0", "1e400", "-1e999999999999",
        "1_000", "1e5e5", "1d5"};
    double value = 7;
    char text[600];
    uint64_t seed = 12345;
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        if (!pk__number(good[i], strlen(good[i]), &value) || bits_of(value) != bits_of(strtod(good[i], NULL)))
            fail_msg("%s is read as %.17g", good[i], value);
    }
    value = 7;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        if (pk__number(bad[i], strlen(bad[i]), &value) || value != 7)
            fail_msg("%s is read as %.17g", bad[i], value);
    for (int i = 0; i < 20000; i++) { /* doubles of every size, at every precision */
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t bits = seed ^ seed >> 29;
        double x;
        memcpy(&x, &bits, sizeof x);
        if (!isfinite(x) || i % 2)
            x = (double)(int64_t)bits / 9007199254740992.0;
        int length = snprintf(text, sizeof text, "%.*e", i % 19, x);
        assert_true(pk__number(text, (size_t)length, &value));
        assert_true(bits_of(value) == bits_of(strtod(text, NULL)));
        length = snprintf(text, sizeof text, "%.17g", x);
        assert_true(pk__number(text, (size_t)length, &value) && bits_of(value) == bits_of(x));
    }
    memset(text, '0', sizeof text);
    assert_true(pk__number(text, 511, &value) && value == 0);
    assert_false(pk__number(text, 512, &value));
    assert_true(pk__finite(0) && pk__finite(-1.7976931348623157e308) && pk__finite(5e-324));
    assert_false(pk__finite((double)INFINITY) || pk__finite((double)-INFINITY) || pk__finite((double)NAN));
}

/* ---- CSV ---- */

static pk_status read_csv(const char *text, size_t size, int target_columns, pk_dataset *dataset)
{
    char *copy = (char *)malloc(size ? size : 1);
    assert_non_null(copy);
    memcpy(copy, text, size);
    pk_status status = pk__csv_dataset(&context, "x.csv", copy, size, target_columns, dataset);
    free(copy);
    return status;
}

static void test_csv(void **state)
{
    static const struct {
        const char *text;
        int target_columns;
        size_t rows, width;
    } good[] = {
        {"1,2,3\n4,5,6\n", 0, 2, 2},
        {"1,2,3\n4,5,6", 0, 2, 2},
        {"1,2,3\r\n4,5,6\r\n\r\n\n", 0, 2, 2},
        {"a,b,label\n1,2,3\n4,5,6\n", 0, 2, 2},
        {"# 'x,\"y,z\",label\n1,2,3\n4,5,6\n", 0, 2, 2},
        {"\xef\xbb\xbfone,,three\r\n1,2,3\r\n4,5,6", 0, 2, 2},
        {" 1 ,\t2, 3.0\n4.000000000000000000e+00,5e0,.6e1 \n", 0, 2, 2},
        {"1,2,3\n4,5,6\n", 1, 2, 2},
        {"1,2,3\n4,5,6\n", 2, 2, 1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        pk_dataset dataset;
        int columns = good[i].target_columns;
        assert_ok(read_csv(good[i].text, strlen(good[i].text), columns, &dataset));
        assert_int_equal(pk_dataset_examples(&dataset), 2);
        assert_int_equal(pk_dataset_width(&dataset), good[i].width);
        assert_int_equal(dataset.inputs.type, PK_FLOAT64);
        assert_int_equal(dataset.targets.type, columns ? PK_FLOAT64 : PK_INT64);
        assert_int_equal(dataset.targets.rank, columns == 2 ? 2 : 1);
        for (size_t row = 0; row < 2; row++)
            for (size_t column = 0; column < 3; column++) {
                double value;
                if (column < good[i].width)
                    value = ((const double *)dataset.inputs.data)[row * good[i].width + column];
                else if (columns)
                    value = ((const double *)
                                 dataset.targets.data)[row * (3 - good[i].width) + column - good[i].width];
                else
                    value = (double)((const int64_t *)dataset.targets.data)[row];
                assert_true(value == (double)(1 + 3 * row + column));
            }
        pk_dataset_release(&context, &dataset);
    }
}

static void test_csv_refuses(void **state)
{
    static const struct {
        const char *text, *words;
        int target_columns;
    } bad[] = {
        {"", "holds no numbers", 0},
        {"\n\r\n  \n", "holds no numbers", 0},
        {"\xef\xbb\xbf", "holds no numbers", 0},
        {"a,b\n", "a header but no numbers", 0},
        {"1,2\n3\n", "line 2 has 1 columns, line 1 has 2", 0},
        {"1,2\n3,4,5\n", "line 2 has 3 columns", 0},
        {"a,b\n1,2\n3,4,5\n", "line 3 has 3 columns", 0},
        {"a,b,c\n1,2\n", "line 2 has 2 columns, line 1 has 3", 0},
        {"1,2\n\n3,4\n", "line 2 is empty", 0},
        {"1,2\n3,x\n", "line 2, column 2: 'x'", 0},
        {"1,2\n3,\n", "line 2, column 2: ''", 0},
        {"1,2\n3 4,5\n", "line 2, column 1: '3 4'", 0},
        {"1,nan\n", "line 1, column 2: 'nan'", 1},
        {"1,1e999\n", "'1e999' is not a finite number", 1},
        {"1,inf\n", "not a finite number", 1},
        {"1,0x10\n", "not a finite number", 1},
        {"1;2\n", "1 columns", 0},
        {"1,2.5\n", "line 1, column 2: '2.5' is not an integer label", 0},
        {"1,1e300\n", "not an integer label", 0},
        {"1,2,x\n3,4,5\n", "line 1, column 3", 0}, /* a header has no number */
        {"\"1\",2\n", "line 1, column 1", 0},
        {"1,2\n3,4\r5\n", "line 2, column 2: '4?5'", 0},
        {"7\n8\n", "line 1 has 1 columns", 0},
        {"7,8\n", "line 1 has 2 columns, there must be more than the 2", 2},
        {"1,2\n1,abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz\n",
         "'abcdefghijklmnopqrstuvwxyzabcdefghijklm'", 0},
    };
    pk_dataset dataset, before;
    (void)state;
    memset(&before, 0x5a, sizeof before);
    dataset = before;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_status(PK_FORMAT, bad[i].words,
                      read_csv(bad[i].text, strlen(bad[i].text), bad[i].target_columns, &dataset));
        assert_non_null(strstr(pk_message(&context), "x.csv"));
        assert_memory_equal(&dataset, &before, sizeof dataset);
    }
    assert_status(PK_FORMAT, "'?5'",
                  read_csv("1,2\n3,\0"
                           "5\n",
                           9, 0, &dataset));
    in_folder("table.csv", path);
    write_file(path, "1,2\n3,4,5\n", 10);
    assert_status(PK_FORMAT, "table.csv: line 2 has 3", pk_dataset_csv(&context, path, 0, &dataset));
    assert_status(PK_ARGUMENT, "-1", pk_dataset_csv(&context, path, -1, &dataset));
    assert_status(PK_ARGUMENT, "NULL", pk_dataset_csv(&context, NULL, 0, &dataset));
    assert_status(PK_ARGUMENT, "NULL", pk_dataset_csv(&context, path, 0, NULL));
    assert_status(PK_IO, "directory", pk_dataset_csv(&context, folder, 0, &dataset));
    assert_status(PK_FORMAT, "2147483647 of the targets", pk_dataset_csv(&context, path, 2147483647, &dataset));
    write_file(path, "", 0);
    assert_status(PK_FORMAT, "no numbers", pk_dataset_csv(&context, path, 0, &dataset));
    /* Wide first line, many short ones: no memory is asked for before the lines are counted. */
    static char wide[300000];
    memset(wide, ',', 150000);
    wide[0] = '1';
    for (int i = 150000; i < 300000; i++)
        wide[i] = i % 2 ? '1' : '\n';
    context.memory_peak = context.memory_used;
    assert_status(PK_FORMAT, "line 2 has 1 columns, line 1 has 150000",
                  read_csv(wide, sizeof wide, 0, &dataset));
    assert_true(context.memory_peak == context.memory_used);
    assert_memory_equal(&dataset, &before, sizeof dataset);
}

/* Reading, formatting and messages where the program's locale has a decimal comma. */
static void test_locale(void **state)
{
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "de_DE"};
    pk_dataset dataset;
    pk_optimizer optimizer;
    pk_graph graph;
    char text[256], message[PK_MESSAGE_SIZE];
    int found = 0;
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof names[0] && !found; i++)
        found = setlocale(LC_ALL, names[i]) != NULL;
    if (!found)
        print_message("no locale with a decimal comma is installed: tried with C only\n");
    pk_status status = read_csv("1.5,2.50000000000000001,3\n", 26, 0, &dataset);
    pk_status parsed =
        pk_optimizer_parse(&context, "adam beta1=0.12345678901234566 epsilon=1.5e-30", &optimizer);
    pk_status formatted = pk_optimizer_format(&optimizer, text, sizeof text);
    memset(&graph, 0, sizeof graph);
    pk_status network = pk_network_parse(&context, "input 2; dense 3; leaky_relu 0.25; dense 1", &graph);
    pk_status refused = pk_optimizer_parse(&context, "adam beta1=1.5", &optimizer);
    memcpy(message, pk_message(&context), sizeof message);
    setlocale(LC_ALL, "C");
    assert_ok(status);
    assert_ok(parsed);
    assert_ok(formatted);
    assert_ok(network);
    assert_true(graph.nodes[2].attributes[0] == 0.25);
    pk_graph_release(&context, &graph);
    assert_string_equal(text, "adam beta1=0.12345678901234566 beta2=0.999 epsilon=1.5e-30");
    assert_int_equal(refused, PK_ARGUMENT);
    assert_non_null(strstr(message, "beta1 is 1.5;"));
    assert_true(((const double *)dataset.inputs.data)[0] == 1.5 &&
                ((const double *)dataset.inputs.data)[1] == 2.5);
    pk_dataset_release(&context, &dataset);
}

/* ---- IDX ---- */

static const unsigned char images[] = {0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 1, 2, 253, 254, 255};
static const unsigned char labels[] = {0, 0, 8, 1, 0, 0, 0, 2, 9, 255};

static pk_status read_idx(const void *a, size_t a_size, const void *b, size_t b_size, double scale,
                          pk_dataset *dataset)
{
    pk__file files[2] = {{(unsigned char *)malloc(a_size + 1), a_size},
                         {(unsigned char *)malloc(b_size + 1), b_size}};
    memcpy(files[0].bytes + 1, a, a_size); /* so that the end of the memory is the end of the file */
    memcpy(files[1].bytes + 1, b, b_size);
    pk__file ends[2] = {{files[0].bytes + 1, a_size}, {files[1].bytes + 1, b_size}};
    pk_status status = pk__idx_dataset(&context, "a.idx", &ends[0], "b.idx", &ends[1], scale, dataset);
    free(files[0].bytes);
    free(files[1].bytes);
    return status;
}

static void test_idx(void **state)
{
    pk_dataset dataset, before;
    unsigned char bad[sizeof images];
    (void)state;
    write_file(in_folder("images", path), images, sizeof images);
    write_file(in_folder("labels", path2), labels, sizeof labels);
    assert_ok(pk_dataset_idx(&context, path, path2, 1.0 / 255, &dataset));
    assert_true(dataset.inputs.rank == 3 && dataset.inputs.shape[0] == 2 && dataset.inputs.shape[1] == 1);
    assert_true(pk_dataset_width(&dataset) == 3 && pk_dataset_examples(&dataset) == 2);
    for (int i = 0; i < 6; i++)
        assert_true(((const double *)dataset.inputs.data)[i] == images[16 + i] * (1.0 / 255));
    assert_true(dataset.targets.type == PK_INT64 && dataset.targets.rank == 1);
    assert_true(((const int64_t *)dataset.targets.data)[0] == 9 &&
                ((const int64_t *)dataset.targets.data)[1] == 255);
    pk_dataset_release(&context, &dataset);

    memset(&before, 0x5a, sizeof before);
    dataset = before;
    for (size_t cut = 0; cut < sizeof images; cut++)
        assert_status(PK_FORMAT, "a.idx", read_idx(images, cut, labels, sizeof labels, 1, &dataset));
    for (size_t cut = 0; cut < sizeof labels; cut++)
        assert_status(PK_FORMAT, "b.idx", read_idx(images, sizeof images, labels, cut, 1, &dataset));
    assert_status(PK_FORMAT, "gzip", read_idx("\x1f\x8b\x08\x00", 4, labels, sizeof labels, 1, &dataset));
    assert_status(PK_SHAPE, "(2, 1, 3) for 2",
                  read_idx(images, sizeof images, images, sizeof images, 1, &dataset));
    memcpy(bad, images, sizeof bad);
    bad[2] = 0x0d;
    assert_status(PK_UNSUPPORTED, "0x0d", read_idx(bad, sizeof bad, labels, sizeof labels, 1, &dataset));
    bad[2] = 8, bad[3] = 0;
    assert_status(PK_UNSUPPORTED, "0 dimensions",
                  read_idx(bad, sizeof bad, labels, sizeof labels, 1, &dataset));
    bad[3] = 255;
    assert_status(PK_UNSUPPORTED, "255 dimensions",
                  read_idx(bad, sizeof bad, labels, sizeof labels, 1, &dataset));
    bad[3] = 3;
    memset(bad + 4, 0xff, 12); /* 2^96 bytes */
    assert_status(PK_OVERFLOW, "overflows", read_idx(bad, sizeof bad, labels, sizeof labels, 1, &dataset));
    memcpy(bad, images, sizeof bad);
    bad[7] = 3;
    assert_status(PK_FORMAT, "(3, 1, 3) takes 9 bytes, the file holds 6",
                  read_idx(bad, sizeof bad, labels, sizeof labels, 1, &dataset));
    static const unsigned char one[] = {0, 0, 8, 1, 0, 0, 0, 1, 9};
    assert_status(PK_SHAPE, "labels (1,) for 2 images",
                  read_idx(images, sizeof images, one, sizeof one, 1, &dataset));
    /* No pixels, 2^32 - 1 images: as many labels are not in the file. */
    static const unsigned char hollow[] = {0, 0, 8, 2, 255, 255, 255, 255, 0, 0, 0, 0};
    assert_status(PK_SHAPE, "for 4294967295",
                  read_idx(hollow, sizeof hollow, labels, sizeof labels, 1, &dataset));
    assert_status(PK_ARGUMENT, "NULL", pk_dataset_idx(&context, NULL, path2, 1, &dataset));
    assert_status(PK_ARGUMENT, "NULL", pk_dataset_idx(&context, path, path2, 1, NULL));
    assert_status(PK_ARGUMENT, "not finite", pk_dataset_idx(&context, path, path2, (double)INFINITY, &dataset));
    assert_status(PK_IO, "none", pk_dataset_idx(&context, path, in_folder("none", path2), 1, &dataset));
    assert_memory_equal(&dataset, &before, sizeof dataset);
}

/* ---- data sets ---- */

static void test_dataset_check(void **state)
{
    enum { ROWS = 3000 };
    static double inputs[ROWS * 4];
    static float floats[ROWS * 2];
    static int64_t classes[ROWS];
    static unsigned char bytes[ROWS];
    size_t shape[3] = {ROWS, 2, 2}, pairs[2] = {ROWS, 2}, fewer = ROWS - 1, none[2] = {0, 4},
           column[2] = {ROWS, 1}, cube[3] = {ROWS, 1, 2};
    pk_dataset dataset, other;
    (void)state;
    for (int i = 0; i < ROWS; i++)
        classes[i] = i % 3;
    dataset.inputs = pk_array_view(PK_FLOAT64, 3, shape, inputs);
    dataset.targets = pk_array_view(PK_INT64, 1, shape, classes);
    assert_ok(pk_dataset_check(&context, &dataset, 4, 3));
    assert_status(PK_SHAPE, "inputs (3000, 2, 2): 4 numbers an example, the network takes 5",
                  pk_dataset_check(&context, &dataset, 5, 3));
    classes[77] = -1; /* labels are for the loss to judge: with one output they are numbers */
    assert_ok(pk_dataset_check(&context, &dataset, 4, 1));
    assert_ok(pk_loss_check(&context, PK_SQUARED, &dataset, 1));
    assert_status(PK_ARGUMENT, "row 77: label -1", pk_loss_check(&context, PK_SQUARED, &dataset, 3));
    assert_status(PK_ARGUMENT, "row 1: label 1", pk_loss_check(&context, PK_NLL, &dataset, 1));
    classes[77] = 0;
    for (int i = 0; i < 3; i++) {
        static const size_t places[3] = {0, 4 * 2047 + 3, 4 * ROWS - 1};
        inputs[places[i]] = (double)(i == 1 ? NAN : i ? INFINITY : -INFINITY);
        static const char *const words[3] = {"row 0, number 0", "row 2047, number 3", "row 2999, number 3"};
        assert_status(PK_NOT_FINITE, words[i], pk_dataset_check(&context, &dataset, 4, 3));
        inputs[places[i]] = 0;
    }
    other = dataset;
    other.targets = pk_array_view(PK_FLOAT32, 2, pairs, floats);
    assert_ok(pk_dataset_check(&context, &other, 4, 2));
    assert_status(PK_SHAPE, "targets (3000, 2) float32", pk_dataset_check(&context, &other, 4, 3));
    floats[2 * 500 + 1] = (float)NAN;
    assert_status(PK_NOT_FINITE, "targets: row 500, number 1", pk_dataset_check(&context, &other, 4, 2));
    other.targets = pk_array_view(PK_FLOAT64, 1, shape, inputs);
    assert_ok(pk_dataset_check(&context, &other, 4, 1));
    assert_status(PK_SHAPE, "(3000,) float64", pk_dataset_check(&context, &other, 4, 2));
    other.targets = pk_array_view(PK_FLOAT64, 3, cube, inputs);
    assert_status(PK_SHAPE, "(3000, 1, 2) float64", pk_dataset_check(&context, &other, 4, 2));
    other.targets = pk_array_view(PK_INT64, 2, column, classes);
    assert_status(PK_SHAPE, "(3000, 1) int64", pk_dataset_check(&context, &other, 4, 3));
    other.targets = pk_array_view(PK_UINT8, 1, shape, bytes);
    assert_ok(pk_dataset_check(&context, &other, 4, 3));      /* labels, of whatever integers */
    other.targets = pk_array_view(PK_BOOL, 2, pairs, floats); /* vectors, of whatever numbers */
    assert_ok(pk_dataset_check(&context, &other, 4, 2));
    assert_status(PK_SHAPE, "targets (3000, 2) bool", pk_dataset_check(&context, &other, 4, 3));
    other.targets = pk_array_view(PK_INT64, 1, &fewer, classes);
    assert_status(PK_SHAPE, "not one target row", pk_dataset_check(&context, &other, 4, 3));
    other.targets = pk_array_view(PK_INT64, 0, NULL, classes);
    assert_status(PK_SHAPE, "not one target row", pk_dataset_check(&context, &other, 4, 3));
    other.targets = pk_array_view(PK_INT64, 1, shape, NULL);
    assert_status(PK_ARGUMENT, "NULL", pk_dataset_check(&context, &other, 4, 3));
    other.inputs = pk_array_view(PK_FLOAT64, 2, none, inputs);
    other.targets = pk_array_view(PK_INT64, 1, none, classes);
    assert_status(PK_SHAPE, "no examples", pk_dataset_check(&context, &other, 4, 3));
#ifdef PATHKERNEL_FLOAT
    inputs[5] = 1e39;
    assert_status(PK_NOT_FINITE, "inputs: row 1, number 1", pk_dataset_check(&context, &dataset, 4, 3));
#endif
    memset(&other, 0, sizeof other);
    assert_status(PK_ARGUMENT, "no inputs", pk_dataset_check(&context, &other, 4, 3));
    assert_status(PK_ARGUMENT, "no inputs", pk_dataset_check(&context, NULL, 4, 3));
}

static void test_dataset_rows(void **state)
{
    double inputs[12];
    float singles[12];
    int64_t classes[4] = {3, 2, 1, 0}, items[5] = {3, 0, 0, 2, 3};
    size_t shape[2] = {4, 3}, fewer = 3;
    pk_dataset dataset, part;
    pk_real rows[15];
    (void)state;
    for (int i = 0; i < 12; i++)
        inputs[i] = singles[i] = (float)i;
    dataset.targets = pk_array_view(PK_INT64, 1, shape, classes);
    for (int single = 0; single < 2; single++) {
        dataset.inputs =
            pk_array_view(single ? PK_FLOAT32 : PK_FLOAT64, 2, shape, single ? (void *)singles : inputs);
        pk_dataset_inputs(&dataset, items, 5, rows);
        for (int i = 0; i < 15; i++)
            assert_true(rows[i] == (pk_real)(3 * items[i / 3] + i % 3));
        assert_ok(pk_dataset_rows(&context, &dataset, 1, 3, &part));
        assert_true(pk_dataset_examples(&part) == 3 && part.targets.shape[0] == 3);
        assert_true(*(const int64_t *)part.targets.data == 2);
        pk_dataset_inputs(&part, items + 1, 1, rows);
        assert_true(rows[0] == 3 && rows[2] == 5);
        assert_ok(pk_dataset_rows(&context, &dataset, 4, 0, &part));
        assert_int_equal(pk_dataset_examples(&part), 0);
        pk_dataset_release(&context, &part); /* a view owns nothing */
    }
    memset(&part, 0x5a, sizeof part);
    assert_status(PK_SHAPE, "rows 1 .. +4 of a data set of 4",
                  pk_dataset_rows(&context, &dataset, 1, 4, &part));
    assert_status(PK_SHAPE, "rows", pk_dataset_rows(&context, &dataset, 1, SIZE_MAX, &part));
    assert_status(PK_SHAPE, "rows", pk_dataset_rows(&context, &dataset, 5, 0, &part));
    assert_status(PK_ARGUMENT, "NULL", pk_dataset_rows(&context, NULL, 0, 0, &part));
    dataset.targets = pk_array_view(PK_INT64, 1, &fewer, classes);
    assert_status(PK_SHAPE, "rows", pk_dataset_rows(&context, &dataset, 0, 1, &part));
}

/* ---- memory ---- */

static pk_status call_idx(pk_context *with, made *out)
{
    pk_status status = pk_dataset_idx(with, path, path2, 1, &out->dataset);
    if (status == PK_OK)
        pk_dataset_release(with, &out->dataset);
    return status;
}

static pk_status call_csv(pk_context *with, made *out)
{
    pk_status status = pk_dataset_csv(with, path, 0, &out->dataset);
    if (status == PK_OK)
        pk_dataset_release(with, &out->dataset);
    return status;
}

static void test_memory(void **state)
{
    (void)state;
    write_file(in_folder("images", path), images, sizeof images);
    write_file(in_folder("labels", path2), labels, sizeof labels);
    check_allocations(call_idx, 2);
    write_file(in_folder("small.csv", path), "1,2,3\n4,5,6\n", 12);
    check_allocations(call_csv, 2);
}

/* ---- the program ---- */

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_numbers),      cmocka_unit_test(test_csv),
        cmocka_unit_test(test_csv_refuses),  cmocka_unit_test(test_locale),
        cmocka_unit_test(test_idx),          cmocka_unit_test(test_dataset_check),
        cmocka_unit_test(test_dataset_rows), cmocka_unit_test(test_memory),
    };
    int before = first_free_descriptor();
    int failed = cmocka_run_group_tests(tests, set_up, tear_down);
    if (first_free_descriptor() != before) {
        print_error("a file was left open\n");
        failed++;
    }
    return failed;
}
