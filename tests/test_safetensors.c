/* Weights as .safetensors: what is written is read back to the bit, a file of the safetensors package is read,
 * and what is wrong with a file is named. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#ifndef PATHKERNEL_TEST_AMALGAM
#include "pathkernel/network.h"
#include "pathkernel/safetensors.h"
#endif
#include "files.h"
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum { PARAMETERS = 10 }; /* of small() */

static pk_graph parsed(const char *text)
{
    pk_graph graph;
    memset(&graph, 0, sizeof graph);
    assert_ok(pk_network_parse(&context, text, &graph));
    return graph;
}

static pk_graph small(void)
{
    pk_graph graph = parsed("input 3; dense 2; tanh; dense 1 nobias");
    assert_int_equal(graph.parameters, PARAMETERS);
    return graph;
}

/* ---- good files ---- */

static void round_trip(const char *text, int float32)
{
    pk_graph graph = parsed(text);
    pk_real *weights = (pk_real *)calloc(graph.parameters, sizeof *weights);
    pk_real *again = (pk_real *)calloc(graph.parameters, sizeof *again);
    assert_true(weights && again);
    assert_ok(pk_network_initialize(&context, &graph, 5, weights));
    weights[0] = (pk_real)-0.0;
    in_folder("trip.safetensors", path);
    assert_ok(pk_safetensors_write(&context, path, &graph, weights, float32));
    assert_ok(pk_safetensors_read(&context, path, &graph, again));
    for (size_t i = 0; i < graph.parameters; i++) {
        pk_real expected = float32 ? (pk_real)(float)weights[i] : weights[i];
        assert_memory_equal(&again[i], &expected, sizeof expected);
    }
    struct stat about;
    assert_int_equal(stat(path, &about), 0);
    assert_int_equal(about.st_size % (float32 ? 4 : 8), 0);
    assert_int_not_equal(access(in_folder("trip.safetensors.tmp", path2), F_OK), 0);
    free(weights), free(again);
    pk_graph_release(&context, &graph);
}

static void test_round_trip(void **state)
{
    char deep[2000] = "input 4";
    (void)state;
    for (int i = 0; i < 40; i++) /* names of one and of two digits: another order by name than by layer */
        strcat(deep, i % 3 ? "; dense 4; relu" : "; dense 4 nobias");
    for (int float32 = 0; float32 < 2; float32++) {
        round_trip("input 1; dense 1", float32);
        round_trip("input 1; dense 1 nobias", float32);
        round_trip("input 64; identity; dense 32; tanh; dense 32; relu; dense 10 nobias", float32);
        round_trip(deep, float32);
    }
}

/* import torch, safetensors.torch
 * safetensors.torch.save({"0.weight": torch.tensor([[1., -2.5, 3.], [4., 5., 6e-3]]),
 *     "0.bias": torch.tensor([0.5, -0.25]), "2.weight": torch.tensor([[7., -8.]])}, metadata={"format": "pt"}) */
static const char package_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},\"0.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
    "\"0.weight\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[8,32]},"
    "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40]}} ";
static const float package_data[PARAMETERS] = {0.5f, -0.25f, 1, -2.5f, 3, 4, 5, 6e-3f, 7, -8};

/* A file of this header and data, in memory of its own size, is parsed. */
static pk_status parse(const char *header, const void *data, size_t size, const pk_graph *graph, pk_real *weights)
{
    size_t length = strlen(header);
    unsigned char *bytes = (unsigned char *)malloc(8 + length + size);
    assert_non_null(bytes);
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)((uint64_t)length >> 8 * i);
    memcpy(bytes + 8, header, length);
    memcpy(bytes + 8 + length, data, size);
    pk_status status = pk__safetensors_parse(&context, "x", bytes, 8 + length + size, graph, weights);
    free(bytes);
    return status;
}

static void assert_package(const pk_real *weights)
{
    static const int order[PARAMETERS] = {2, 3, 4, 5, 6, 7, 0, 1, 8, 9};
    for (int i = 0; i < PARAMETERS; i++)
        assert_true(weights[i] == (pk_real)package_data[order[i]]);
}

static void test_package(void **state)
{
    /* Each means the same: blanks, another order, escapes, no metadata, unaligned numbers. */
    static const char *const same[] = {
        package_header,
        "{\"2.weight\":{\"shape\":[1,2],\"data_offsets\":[32,40],\"dtype\":\"F32\"},"
        "\"0.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
        "\"0.weight\":{\"data_offsets\":[8,32],\"dtype\":\"F32\",\"shape\":[2,3]}}",
        " { \"\\u0030.weig\\u0068t\"\n:\t{ \"dtype\" : \"F32\" , \"shape\" : [ 2 , 3 ] , \"data_offsets\" : [ 8 , 32 ] } ,\r\n"
        "\"0.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
        "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40]},\"__metadata__\":{}}   ",
        "{\"__metadata__\":{\"a\":\"{\\\"x\\\": [1]}\",\"long key\":\"\xc3\xa9 \\u00e9 \\n and so on and on\"},"
        "\"0.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
        "\"0.weight\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[8,32]},"
        "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40]}}"};
    pk_graph graph = small();
    pk_real weights[PARAMETERS];
    (void)state;
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++) {
        memset(weights, 0, sizeof weights);
        assert_ok(parse(same[i], package_data, sizeof package_data, &graph, weights));
        assert_package(weights);
    }
    unsigned char mixed[8 + 24 + 16];
    double bias = 0.1, last[2] = {7, -8};
    memcpy(mixed, &bias, 8);
    pk_graph other = parsed("input 3; dense 1; relu; dense 2 nobias");
    memcpy(mixed + 8, package_data + 2, 12);
    memcpy(mixed + 20, last, 16);
    assert_ok(parse("{\"0.bias\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]},"
                    "\"0.weight\":{\"dtype\":\"F32\",\"shape\":[1,3],\"data_offsets\":[8,20]},"
                    "\"2.weight\":{\"dtype\":\"F64\",\"shape\":[2,1],\"data_offsets\":[20,36]}}",
                    mixed, 36, &other, weights));
    assert_true(weights[1] == (pk_real)-2.5 && weights[3] == (pk_real)0.1 && weights[5] == -8);
    pk_graph_release(&context, &other);
    pk_graph_release(&context, &graph);
}

/* ---- bad files ---- */

static pk_real untouched[PARAMETERS];

static void refuse(pk_status wanted, const char *words, const char *header, const void *data, size_t size)
{
    pk_graph graph = small();
    pk_real weights[PARAMETERS];
    memset(weights, 0x5a, sizeof weights);
    memcpy(untouched, weights, sizeof weights);
    pk_status status = parse(header, data, size, &graph, weights);
    if (status != wanted || !strstr(pk_message(&context), words))
        fail_msg("%s\n%s: %s; wanted %s: %s", header, pk_status_text(status), pk_message(&context),
                 pk_status_text(wanted), words);
    assert_memory_equal(weights, untouched, sizeof weights);
    pk_graph_release(&context, &graph);
}

static void test_lies(void **state)
{
    static const char bias[] = "\"0.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}";
    static const char weight[] = "\"0.weight\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[8,32]}";
    static const struct {
        pk_status status;
        const char *words, *last; /* what stands in the place of layer 2's weight */
    } bad[] = {
        {PK_SHAPE, "has no tensor '2.weight'", "\"__metadata__\":{}"},
        {PK_SHAPE, "'3.weight', which the network does not have",
         "\"3.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40]}"},
        {PK_SHAPE, "which the network does not have",
         "\"2.weightxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\":"
         "{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "'0.bias' twice", "\"0.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}"},
        {PK_SHAPE, "'2.weight' is (2, 1), the network's is (1, 2)",
         "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[32,40]}"},
        {PK_SHAPE, "is (2,), the network's",
         "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[32,40]}"},
        {PK_SHAPE, "is (), the network's", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[32,40]}"},
        {PK_SHAPE, "(too large)",
         "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[9000000000000000000,3],\"data_offsets\":[32,40]}"},
        {PK_UNSUPPORTED, "holds BF16", "\"2.weight\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[32,36]}"},
        {PK_FORMAT, "is said to be bytes 32 to 48 of 40; it takes 8",
         "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,48]}"},
        {PK_FORMAT, "it takes 8", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,36]}"},
        {PK_FORMAT, "it takes 8", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[40,32]}"},
        {PK_FORMAT, "it takes 8",
         "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[18446744073709551600,18446744073709551608]}"},
        {PK_FORMAT, "starts at byte 24 of the data, not at 32",
         "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[24,32]}"},
        /* The entry's own grammar. */
        {PK_FORMAT, "'2.weight' is malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40],\"x\":1}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,-2],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2.0],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,02],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2,],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,99999999999999999999]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,40,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":{\"dtype\":F32,\"shape\":[1,2],\"data_offsets\":[32,40]}"},
        {PK_FORMAT, "malformed", "\"2.weight\":null"},
        {PK_FORMAT, "at byte", "\"2.weight\""},
        {PK_FORMAT, "at byte", "\"2.weight\\x\":{}"},
        {PK_FORMAT, "at byte", "\"2.weight\\u00g0\":{}"},
        {PK_FORMAT, "at byte", "\"2.wei\tght\":{}"},
        {PK_FORMAT, "at byte", "\"__metadata__\":{\"a\":1}"},
        {PK_FORMAT, "at byte", "\"__metadata__\":{},\"__metadata__\":{}"},
        {PK_FORMAT, "at byte", "2"},
        {PK_FORMAT, "at byte", ""},
    };
    char header[1000];
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        snprintf(header, sizeof header, "{%s,%s,%s}", bias, weight, bad[i].last);
        refuse(bad[i].status, bad[i].words, header, package_data, sizeof package_data);
    }
    refuse(PK_FORMAT, "at byte", "", package_data, 0);
    refuse(PK_FORMAT, "at byte", "[]", package_data, 0);
    refuse(PK_SHAPE, "has no tensor", "{}", package_data, 0);
    snprintf(header, sizeof header, "%s}", package_header);
    refuse(PK_FORMAT, "at byte", header, package_data, sizeof package_data);
    refuse(PK_FORMAT, "of 39; it takes", package_header, package_data, sizeof package_data - 1);
    unsigned char longer[sizeof package_data + 3] = {0};
    refuse(PK_FORMAT, "3 bytes follow the last tensor", package_header, longer, sizeof longer);
    float data[PARAMETERS];
    memcpy(data, package_data, sizeof data);
    data[9] = (float)NAN;
    refuse(PK_NOT_FINITE, "item 1 of '2.weight' is", package_header, data, sizeof data);
    data[9] = (float)INFINITY;
    refuse(PK_NOT_FINITE, "item 1 of '2.weight' is inf", package_header, data, sizeof data);
}

/* Every prefix, and every byte changed, of a good file: an answer, never more than the file is read. */
static void test_every_byte(void **state)
{
    unsigned char bytes[600];
    size_t length = strlen(package_header), size = 8 + length + sizeof package_data;
    pk_graph graph = small();
    pk_real weights[PARAMETERS];
    (void)state;
    memset(bytes, 0, sizeof bytes);
    bytes[0] = (unsigned char)length;
    bytes[1] = (unsigned char)(length >> 8);
    memcpy(bytes + 8, package_header, length);
    memcpy(bytes + 8 + length, package_data, sizeof package_data);
    for (size_t cut = 0; cut < size; cut++) {
        unsigned char *copy = (unsigned char *)malloc(cut ? cut : 1);
        assert_non_null(copy);
        memcpy(copy, bytes, cut);
        assert_int_equal(pk__safetensors_parse(&context, "x", copy, cut, &graph, weights), PK_FORMAT);
        free(copy);
    }
    for (size_t at = 0; at < size; at++)
        for (int change = 1; change < 256; change++) {
            bytes[at] ^= (unsigned char)change;
            pk_status status = pk__safetensors_parse(&context, "x", bytes, size, &graph, weights);
            assert_true(at >= 8 + length ? status == PK_OK || status == PK_NOT_FINITE : status <= PK_UNSUPPORTED);
            bytes[at] ^= (unsigned char)change;
        }
    memset(bytes, 0xff, 8);
    assert_status(PK_FORMAT, "a header of 18446744073709551615 bytes",
                  pk__safetensors_parse(&context, "x", bytes, size, &graph, weights));
    pk_graph_release(&context, &graph);
}

static void test_files(void **state)
{
    pk_graph graph = small(), none;
    pk_real weights[PARAMETERS], good[PARAMETERS];
    int descriptor = first_free_descriptor();
    (void)state;
    for (int i = 0; i < PARAMETERS; i++)
        good[i] = (pk_real)(i + 0.5);
    memset(&none, 0, sizeof none);
    in_folder("w.safetensors", path);
    assert_status(PK_ARGUMENT, "missing", pk_safetensors_write(&context, path, &graph, NULL, 0));
    assert_status(PK_ARGUMENT, "missing", pk_safetensors_write(&context, NULL, &graph, good, 0));
    assert_status(PK_ARGUMENT, "missing", pk_safetensors_write(&context, path, &none, good, 0));
    assert_status(PK_ARGUMENT, "missing", pk_safetensors_read(&context, path, NULL, weights));
    assert_status(PK_ARGUMENT, "missing", pk_safetensors_read(&context, NULL, &graph, weights));
    assert_status(PK_IO, "No such file", pk_safetensors_read(&context, path, &graph, weights));
    assert_status(PK_IO, "a directory", pk_safetensors_read(&context, folder, &graph, weights));
    assert_status(PK_IO, "No such file",
                  pk_safetensors_write(&context, in_folder("no/w.safetensors", path2), &graph, good, 0));
    write_file(path, "", 0);
    assert_status(PK_FORMAT, "0 bytes", pk_safetensors_read(&context, path, &graph, weights));
    /* What cannot be written leaves the file as it was. */
    assert_ok(pk_safetensors_write(&context, path, &graph, good, 0));
    memcpy(weights, good, sizeof weights);
    weights[8] = (pk_real)NAN;
    assert_status(PK_NOT_FINITE, "item 0 of '2.weight'", pk_safetensors_write(&context, path, &graph, weights, 0));
    if (sizeof(pk_real) == 8) {
        weights[8] = (pk_real)1e39;
        assert_status(PK_NOT_FINITE, "not a finite float32", pk_safetensors_write(&context, path, &graph, weights, 1));
        assert_ok(pk_safetensors_write(&context, path, &graph, weights, 0));
        assert_ok(pk_safetensors_write(&context, path, &graph, good, 0));
    }
    struct rlimit before, little;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    little = before;
    little.rlim_cur = 100;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &little), 0);
    pk_status status = pk_safetensors_write(&context, path, &graph, good, 1);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, handler);
    assert_status(PK_IO, "cannot be written: File too large", status);
    assert_ok(pk_safetensors_read(&context, path, &graph, weights));
    assert_memory_equal(weights, good, sizeof good);
    assert_int_not_equal(access(in_folder("w.safetensors.tmp", path2), F_OK), 0);
    assert_int_equal(first_free_descriptor(), descriptor); /* none was left open */
    pk_graph_release(&context, &graph);
}

/* An operation whose weights have no shape that is known here. */
static void test_other_forms(void **state)
{
    pk_graph graph = small();
    pk_operation other = *graph.nodes[1].operation;
    pk_real weights[PARAMETERS] = {0};
    (void)state;
    other.name = "mine";
    graph.nodes[1].operation = &other;
    graph.nodes[1].tangent_form = PK_TANGENT_ROWS;
    in_folder("w.safetensors", path);
    assert_status(PK_UNSUPPORTED, "layer 0, 'mine'", pk_safetensors_write(&context, path, &graph, weights, 0));
    assert_status(PK_UNSUPPORTED, "layer 0, 'mine'",
                  parse(package_header, package_data, sizeof package_data, &graph, weights));
    pk_graph_release(&context, &graph);
}

/* ---- memory ---- */

static pk_graph shared;

static pk_status write_call(pk_context *with, made *out)
{
    static const pk_real weights[PARAMETERS] = {0};
    (void)out;
    return pk_safetensors_write(with, path, &shared, weights, 1);
}

static pk_status read_call(pk_context *with, made *out)
{
    pk_real weights[PARAMETERS];
    (void)out;
    return pk_safetensors_read(with, path, &shared, weights);
}

static void test_allocations(void **state)
{
    (void)state;
    shared = small();
    in_folder("m.safetensors", path);
    check_allocations(write_call, 3);
    check_allocations(read_call, 1);
    pk_graph_release(&context, &shared);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_package), cmocka_unit_test(test_lies),
        cmocka_unit_test(test_every_byte), cmocka_unit_test(test_files),   cmocka_unit_test(test_other_forms),
        cmocka_unit_test(test_allocations),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
