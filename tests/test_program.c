/* The program pathkernel under both of its names, run as a user runs it: exit status, what it says, what it writes.
 * It is $PATHKERNEL_DECOMPOSE, or pathkernel-decompose in the folder of this test, and pathkernel beside it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* unshare; pseudo terminals */
#endif
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#endif
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif
#include "pathkernel_under_test.h"
#include "wait_killed.h"

enum { IN = 4, WIDE = 6, OUT = 3, N = 40, S = 12, M = 23, LONG = 60000, TEXT = 20000, ARGUMENTS = 60 };

static char program[1000], root[200];
static char told[TEXT], complained[TEXT]; /* standard output and error of the last run of the program */
static double inputs[M * IN];

/* root/..., in one of a few buffers. */
PK__FORMAT(1, 2)
static const char *in_root(const char *format, ...)
{
    static char paths[16][400];
    static unsigned next;
    char *path = paths[next++ % 16];
    va_list arguments;
    int length = snprintf(path, 400, "%s/", root);
    va_start(arguments, format);
    vsnprintf(path + length, 400 - (size_t)length, format, arguments);
    va_end(arguments);
    return path;
}

static void read_text(const char *path, char text[TEXT])
{
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    text[fread(text, 1, TEXT - 1, file)] = 0;
    fclose(file);
}

static int exists(const char *path)
{
    return access(path, F_OK) == 0;
}

static void shell(const char *command)
{
    char line[1200];
    snprintf(line, sizeof line, "cd '%s' && %s", root, command);
    if (system(line) != 0)
        fail_msg("%s", line);
}

/* ---- running it ---------------------------------------------------------------------------------------- */

static int closed_streams;  /* of the next one: 1 standard input, 2 output, 4 error */
static int traced;          /* by this process, the next one */
static rlim_t file_limit;   /* bytes that the next one may write to one file; 0: any */
static const char *sent_to; /* where its standard output goes instead */

/* What a shell gives its foreground jobs, whoever runs the tests. */
static void default_signals(void)
{
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGHUP, SIG_DFL);
}

/* Starts the program with the words of line, in which % and ^ stand for root and ~ for a blank; as pathkernel where the line
 * begins with @, else as pathkernel-decompose. */
static pid_t start(const char *line)
{
    char name[sizeof program];
    snprintf(name, sizeof name, "%s", program);
    if (*line == '@') {
        char *suffix = strstr(name, "-decompose");
        for (char *next = suffix; next; next = strstr(next + 1, "-decompose"))
            suffix = next;
        assert_non_null(suffix);
        *suffix = 0;
        line++;
    }
    char copy[2000];
    char *arguments[ARGUMENTS];
    size_t used = 0, count = 0;
    for (; *line && used < sizeof copy - 1; line++) {
        if (*line == '%' || *line == '^')
            used += (size_t)snprintf(copy + used, sizeof copy - used, "%s", root);
        else
            copy[used++] = *line;
    }
    copy[used] = 0;
    arguments[count++] = name;
    for (char *word = strtok(copy, " "); word && count < ARGUMENTS - 1; word = strtok(NULL, " "))
        arguments[count++] = word;
    for (size_t i = 1; i < count; i++)
        for (char *blank = arguments[i]; (blank = strchr(blank, '~')) != NULL;)
            *blank = ' ';
    arguments[count] = NULL;
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child) {
        file_limit = 0;
        closed_streams = traced = 0;
        return child;
    }
    int out = open(sent_to ? sent_to : in_root("stdout"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    int err = open(in_root("stderr"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    struct rlimit limit = {file_limit, file_limit};
    default_signals();
    if (dup2(out, STDOUT_FILENO) < 0 || dup2(err, STDERR_FILENO) < 0 ||
        (file_limit && setrlimit(RLIMIT_FSIZE, &limit)))
        _exit(99);
    for (int i = 0; i < 3; i++)
        if (closed_streams >> i & 1)
            close(i);
#ifdef __linux__
    if (traced && ptrace(PTRACE_TRACEME, 0, NULL, NULL))
        _exit(97);
#endif
    execv(name, arguments);
    _exit(98);
}

static int finish(pid_t child)
{
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    read_text(in_root("stdout"), told);
    read_text(in_root("stderr"), complained);
    if (!WIFEXITED(status))
        fail_msg("ended by signal %d; %s", WTERMSIG(status), complained);
    return WEXITSTATUS(status);
}

PK__FORMAT(2, 3)
static void expect(int status, const char *format, ...)
{
    char line[1500];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    int got = finish(start(line));
    if (got != status)
        fail_msg("%s\nexit status %d, not %d; %s", line, got, status, complained);
}

/* Status 2, nothing on standard output, one line on standard error, and these words in it. */
static void expect_refused(const char *line, const char *words)
{
    expect(2, "%s", line);
    const char *name = *line == '@' ? "pathkernel" : "pathkernel-decompose: ";
    if (*told || !strstr(complained, words) || strncmp(complained, name, strlen(name)) != 0 ||
        strchr(complained, '\n') != complained + strlen(complained) - 1)
        fail_msg("%s\nsays: %s%s\nnot one line with: %s", line, told, complained, words);
}

/* ---- what it wrote ------------------------------------------------------------------------------------- */

static pk_context context;

/* A result as float64 of the given shape (0s end it). */
static pk_array result(const char *path, size_t a, size_t b, size_t c, size_t d)
{
    const size_t shape[4] = {a, b, c, d};
    pk_array array;
    if (pk_array_map(&context, path, 0, &array) != PK_OK)
        fail_msg("%s", pk_message(&context));
    assert_int_equal(array.type, PK_FLOAT64);
    assert_int_equal(array.rank, 2 + (c != 0) + (d != 0));
    for (int i = 0; i < array.rank; i++)
        assert_int_equal(array.shape[i], shape[i]);
    return array;
}

static const double *numbers(const pk_array *array)
{
    return (const double *)array->data;
}

/* final = initial + by_example.sum(2) + decay + unattributed + closure to rounding; so by the other axes. */
static void check_identity(const char *folder, size_t rows, size_t outputs, const char *kept, size_t items)
{
    pk_array six[6];
    static const char *const names[] = {"initial", "final", "decay", "unattributed", "closure"};
    for (int i = 0; i < 5; i++)
        six[i] = result(in_root("%s/%s.npy", folder, names[i]), rows, outputs, 0, 0);
    six[5] = result(in_root("%s/%s.npy", folder, kept), rows, outputs, items, 0);
    for (size_t i = 0; i < rows * outputs; i++) {
        double sum = numbers(&six[0])[i] + numbers(&six[2])[i] + numbers(&six[3])[i] + numbers(&six[4])[i],
               size = 1;
        for (size_t k = 0; k < items; k++) {
            sum += numbers(&six[5])[i * items + k];
            size += fabs(numbers(&six[5])[i * items + k]);
        }
        if (!(fabs(sum - numbers(&six[1])[i]) <= 1e-14 * size))
            fail_msg("%s by %s: %.17g and %.17g in cell %zu", folder, kept, sum, numbers(&six[1])[i], i);
    }
    for (int i = 0; i < 6; i++)
        pk_array_release(&context, &six[i]);
}

/* The same bytes in the results of two folders, rows of the first one only. */
static void check_same(const char *a, const char *b, const char *name)
{
    pk_array one, other;
    assert_int_equal(pk_array_map(&context, in_root("%s/%s.npy", a, name), 0, &one), PK_OK);
    assert_int_equal(pk_array_map(&context, in_root("%s/%s.npy", b, name), 0, &other), PK_OK);
    assert_int_equal(one.rank, other.rank);
    assert_int_equal(one.row_items, other.row_items);
    assert_true(one.shape[0] && one.shape[0] <= other.shape[0]);
    if (memcmp(one.data, other.data, pk_array_items(&one) * sizeof(double)) != 0)
        fail_msg("%s/%s and %s/%s differ", a, name, b, name);
    pk_array_release(&context, &one);
    pk_array_release(&context, &other);
}

static const char *const all_names[] = {"by_example", "initial", "final", "decay", "unattributed", "closure"};

/* Whether the six results of two folders are the same bytes. */
static int all_same(const char *a, const char *b)
{
    for (int i = 0; i < 6; i++) {
        char one[TEXT], other[TEXT];
        FILE *files[2] = {fopen(in_root("%s/%s.npy", a, all_names[i]), "rb"),
                          fopen(in_root("%s/%s.npy", b, all_names[i]), "rb")};
        int same = files[0] && files[1];
        for (size_t got = TEXT; same && got == TEXT;) {
            got = fread(one, 1, TEXT, files[0]);
            same = fread(other, 1, TEXT, files[1]) == got && memcmp(one, other, got) == 0;
        }
        for (int k = 0; k < 2; k++)
            if (files[k])
                fclose(files[k]);
        if (!same)
            return 0;
    }
    return 1;
}

static void check_all_same(const char *a, const char *b)
{
    for (int i = 0; i < 6; i++)
        check_same(a, b, all_names[i]);
}

/* No file that a job leaves behind only when it is killed. */
static void check_no_parts(const char *folder)
{
    if (exists(in_root("%s/.pathkernel", folder)))
        fail_msg("%s/.pathkernel was left behind", folder);
    for (int i = 0; i < 6; i++)
        if (exists(in_root("%s/%s.npy.part", folder, all_names[i])))
            fail_msg("%s/%s.npy.part was left behind", folder, all_names[i]);
}

static void write_array(const char *name, pk_type type, int rank, size_t a, size_t b, const void *data)
{
    const size_t shape[2] = {a, b};
    if (pk_array_write(&context, in_root("%s", name), type, rank, shape, data) != PK_OK)
        fail_msg("%s", pk_message(&context));
}

/* ---- runs ---------------------------------------------------------------------------------------------- */

static size_t keep_every; /* of the next run */

static void train(const char *name, const char *network, const char *optimizer, double rate, size_t steps,
                  int float32)
{
    static double x[N * WIDE];
    static int64_t y[N];
    pk_random random = {7, 0, 0};
    pk_graph graph;
    pk_dataset data;
    pk_train_options options;
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    pk_status status = pk_network_parse(&context, network, &graph);
    const size_t width = graph.input_width, shape[2] = {N, width};
    for (size_t i = 0; i < N; i++) {
        y[i] = (int64_t)(i % OUT);
        for (size_t j = 0; j < width; j++)
            x[i * width + j] = pk_random_normal(&random) + (j == (size_t)y[i]);
    }
    data.inputs = pk_array_view(PK_FLOAT64, 2, shape, x);
    data.targets = pk_array_view(PK_INT64, 1, shape, y);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = rate;
    options.steps = steps;
    options.batch_size = 16;
    options.record = in_root("%s", name);
    options.record_float32 = float32;
    options.keep_every = keep_every;
    keep_every = 0;
    pk_real *weights = NULL;
    if (!status)
        status = pk_optimizer_parse(&context, optimizer, &options.optimizer);
    if (!status)
        status = pk_allocate(&context, graph.parameters, sizeof *weights, "weights", &weights);
    if (!status)
        status = pk_network_initialize(&context, &graph, 3, weights);
    if (!status)
        status = pk_train(&context, &graph, &data, &options, weights, NULL);
    if (status)
        fail_msg("%s: %s", name, pk_message(&context));
    pk_release(&context, weights);
    pk_graph_release(&context, &graph);
}

static int set_up(void **state)
{
    const char *temporary = getenv("TMPDIR");
    pk_random random = {9, 0, 0};
    (void)state;
    snprintf(root, sizeof root, "%.100s/pathkernel-program-XXXXXX", temporary ? temporary : "/tmp");
    if (!mkdtemp(root))
        return -1;
    train("tanh", "input 4; dense 6; tanh; dense 3", "sgd", 0.5, S, 0);
    train("relu", "input 4; dense 6; relu; dense 5; relu; dense 3", "sgd momentum=0.9 weight_decay=0.01", 0.2,
          S, 0);
    train("adamw", "input 4; dense 6; gelu; dense 3", "adamw weight_decay=0.1", 0.02, S, 1);
    train("still", "input 4; dense 3", "sgd", 1, 0, 0);
    for (size_t i = 0; i < M * IN; i++)
        inputs[i] = (double)pk_random_below(&random, 5); /* whole numbers: every item type holds them */
    write_array("x.npy", PK_FLOAT64, 2, M, IN, inputs);
    double *many = (double *)calloc(LONG * IN, sizeof *many);
    if (!many)
        return -1;
    for (size_t i = 0; i < LONG * IN; i++)
        many[i] = i < M * IN ? inputs[i] : pk_random_normal(&random);
    write_array("long.npy", PK_FLOAT64, 2, LONG, IN, many);
    write_array("200.npy", PK_FLOAT64, 2, 200, IN, many);
    free(many);
    return 0;
}

static int tear_down(void **state)
{
    char line[600];
    (void)state;
    snprintf(line, sizeof line, "chmod -R u+w '%s'; rm -rf '%s'", root, root);
    return system(line);
}

/* ---- results ------------------------------------------------------------------------------------------- */

static void test_results(void **state)
{
    static const char *const runs[] = {"tanh", "relu", "adamw"};
    static const size_t layers[] = {2, 3, 2};
    (void)state;
    for (int i = 0; i < 3; i++) {
        pk_run run;
        pk_decomposition d;
        pk_decompose_options options;
        pk_real rows[M * IN];
        for (int k = 0; k < M * IN; k++)
            rows[k] = (pk_real)inputs[k];
        memset(&options, 0, sizeof options);
        options.keep[0] = PK_BY_EXAMPLE;
        options.keep[1] = PK_BY_STEP;
        options.keep[2] = PK_BY_LAYER;
        options.keep[3] = PK_BY_STEP | PK_BY_LAYER;
        options.step_closure = 1;
        expect(0,
               "%%/%s --inputs %%/x.npy --out %%/a/deep/%s --keep train --keep=step --keep layer --keep "
               "step,layer "
               "--step-closure --tolerance %s",
               runs[i], runs[i], EITHER("1e-12", "1e-5"));
        assert_string_equal(complained, ""); /* no progress where nobody looks */
        assert_non_null(strstr(told, "\nclosed\n"));
        assert_int_equal(pk_run_open(&context, in_root("%s", runs[i]), &run), PK_OK);
        assert_int_equal(pk_decompose(&context, &run, pk_matrix_view(rows, M, IN), &options, &d), PK_OK);
        const struct {
            const char *name;
            size_t third, fourth;
            const double *truth;
        } files[] = {{"initial", 0, 0, d.initial},
                     {"final", 0, 0, d.final},
                     {"decay", 0, 0, d.decay},
                     {"unattributed", 0, 0, d.unattributed},
                     {"closure", 0, 0, d.closure},
                     {"by_example", N, 0, d.by_example},
                     {"by_step", S, 0, d.by_step},
                     {"by_layer", layers[i], 0, d.by_layer},
                     {"by_step_layer", S, layers[i], d.kept[3].data},
                     {"closure_by_step", S, 0, d.step_closure}};
        for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
            pk_array array = result(in_root("a/deep/%s/%s.npy", runs[i], files[f].name), M, OUT, files[f].third,
                                    files[f].fourth);
            for (size_t k = 0; k < pk_array_items(&array); k++)
                if (!(fabs(numbers(&array)[k] - files[f].truth[k]) <= ROUNDING(1e-12)))
                    fail_msg("%s, %s: %.17g, not %.17g", runs[i], files[f].name, numbers(&array)[k],
                             files[f].truth[k]);
            pk_array_release(&context, &array);
        }
        char folder[40];
        snprintf(folder, sizeof folder, "a/deep/%s", runs[i]);
        check_identity(folder, M, OUT, "by_example", N);
        check_identity(folder, M, OUT, "by_step", S);
        check_identity(folder, M, OUT, "by_layer", layers[i]);
        check_no_parts(folder);
        pk_decomposition_release(&context, &d);
        pk_run_release(&context, &run);
    }
}

static void test_same_bytes(void **state)
{
    static const char *const runs[] = {"tanh", "relu", "adamw"};
    (void)state;
    for (int i = 0; i < 3; i++) {
        expect(0, "%%/%s --inputs %%/x.npy --out %%/one --threads 1 --memory 4G", runs[i]);
        expect(0, "%%/%s --inputs %%/x.npy --out %%/two --threads 2 --memory 64M", runs[i]);
        check_all_same("one", "two");
        expect(0, "%%/%s --inputs %%/x.npy --out %%/two --threads 3 --rows-at-once 1", runs[i]);
        check_all_same("one", "two");
        /* The least memory that it asks for does. */
        expect(2, "%%/%s --inputs %%/x.npy --out %%/three --memory 1K --threads 1", runs[i]);
        const char *least = strstr(complained, "the least that would do is ");
        assert_non_null(least);
        assert_false(exists(in_root("three")));
        expect(0, "%%/%s --inputs %%/x.npy --out %%/two --threads 1 --memory %llu", runs[i],
               strtoull(least + 27, NULL, 10));
        check_all_same("one", "two");
    }
}

/* The program starts itself again with a short spin, once, unless the environment says something about it. What libgomp found
 * there it prints at each start. */
static void test_short_spin(void **state)
{
    static const struct {
        const char *name, *value, *threads;
        int printed, starts; /* how often the program starts; how many of these have the short spin */
    } cases[] = {{NULL, NULL, "--threads 2", 2, 1},
                 {NULL, NULL, "--threads 1", 1, 0},
                 {"GOMP_SPINCOUNT", "777", "--threads 2", 1, 0},
                 {"OMP_WAIT_POLICY", "passive", "--threads 2", 1, 0},
                 {"OMP_WAIT_POLICY", "active", "--threads 2", 1, 0},
                 {"PATHKERNEL_RESTARTED", "1", "--threads 2", 1, 0}};
    static const char *const variables[] = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "PATHKERNEL_RESTARTED"};
    char *before[3];
    (void)state;
    for (int v = 0; v < 3; v++) {
        before[v] = getenv(variables[v]) ? strdup(getenv(variables[v])) : NULL;
        (void)unsetenv(variables[v]);
    }
    (void)setenv("OMP_DISPLAY_ENV", "verbose", 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (cases[i].name)
            (void)setenv(cases[i].name, cases[i].value, 1);
        expect(0, "%%/tanh --inputs %%/x.npy --out %%/spin --top 0 %s", cases[i].threads);
        int starts = 0, short_spins = 0;
        for (const char *at = complained; (at = strstr(at, "GOMP_SPINCOUNT")); at++) {
            starts++;
            short_spins += strncmp(at, "GOMP_SPINCOUNT = '2000'", 23) == 0;
        }
        if (!starts)
            print_message("left out: this program has no libgomp that prints its environment\n");
        else if (starts != cases[i].printed || short_spins != cases[i].starts)
            fail_msg("%s=%s %s: %d starts, %d of them with a short spin",
                     cases[i].name ? cases[i].name : "nothing", cases[i].value ? cases[i].value : "",
                     cases[i].threads, starts, short_spins);
        if (cases[i].name)
            (void)unsetenv(cases[i].name);
    }
    (void)unsetenv("OMP_DISPLAY_ENV");
    for (int v = 0; v < 3; v++) {
        if (before[v])
            (void)setenv(variables[v], before[v], 1);
        free(before[v]);
    }
}

static void test_outputs(void **state)
{
    int64_t labels[M];
    uint8_t bytes[M];
    (void)state;
    for (int i = 0; i < M; i++) {
        labels[i] = i % OUT;
        bytes[i] = (uint8_t)(i % OUT);
    }
    write_array("labels.npy", PK_INT64, 1, M, 0, labels);
    write_array("bytes.npy", PK_UINT8, 1, M, 0, bytes);
    expect(0, "%%/relu --inputs %%/x.npy --out %%/every");
    expect(0, "%%/relu --inputs %%/x.npy --out %%/number --outputs 2");
    expect(0, "%%/relu --inputs %%/x.npy --out %%/given --outputs label --labels %%/labels.npy");
    expect(0, "%%/relu --inputs %%/x.npy --out %%/given2 --outputs label --labels %%/bytes.npy");
    expect(0, "%%/relu --inputs %%/x.npy --out %%/own --outputs label");
    check_all_same("given", "given2");
    check_identity("number", M, 1, "by_example", N);
    check_identity("own", M, 1, "by_example", N);
    pk_array every = result(in_root("every/by_example.npy"), M, OUT, N, 0),
             ends = result(in_root("every/final.npy"), M, OUT, 0, 0);
    pk_array number = result(in_root("number/by_example.npy"), M, 1, N, 0),
             own = result(in_root("own/by_example.npy"), M, 1, N, 0);
    pk_array given = result(in_root("given/by_example.npy"), M, 1, N, 0);
    for (size_t r = 0; r < M; r++) {
        const double *f = numbers(&ends) + r * OUT;
        size_t best = f[1] > f[0] ? (f[2] > f[1] ? 2 : 1) : f[2] > f[0] ? 2 : 0;
        for (size_t i = 0; i < N; i++) {
            const double *row = numbers(&every) + r * OUT * N + i;
            assert_true(fabs(row[2 * N] - numbers(&number)[r * N + i]) < ROUNDING(1e-12));
            assert_true(fabs(row[best * N] - numbers(&own)[r * N + i]) < ROUNDING(1e-12));
            assert_true(fabs(row[(size_t)labels[r] * N] - numbers(&given)[r * N + i]) < ROUNDING(1e-12));
        }
    }
    pk_array_release(&context, &every);
    pk_array_release(&context, &ends);
    pk_array_release(&context, &number);
    pk_array_release(&context, &own);
    pk_array_release(&context, &given);
}

static void test_input_types(void **state)
{
    float floats[M * IN];
    int64_t integers[M * IN];
    uint8_t bytes[M * IN];
    const size_t shape[4] = {M, 2, 1, 2};
    (void)state;
    for (size_t i = 0; i < M * IN; i++) {
        floats[i] = (float)inputs[i];
        integers[i] = (int64_t)inputs[i];
        bytes[i] = (uint8_t)inputs[i];
    }
    write_array("f.npy", PK_FLOAT32, 2, M, IN, floats);
    write_array("i.npy", PK_INT64, 2, M, IN, integers);
    write_array("b.npy", PK_UINT8, 2, M, IN, bytes);
    assert_int_equal(pk_array_write(&context, in_root("images.npy"), PK_FLOAT64, 4, shape, inputs), PK_OK);
    int32_t words[M * IN];
    uint16_t shorts[M * IN];
    int8_t small[M * IN];
    for (size_t i = 0; i < M * IN; i++) {
        words[i] = (int32_t)inputs[i];
        shorts[i] = (uint16_t)inputs[i];
        small[i] = (int8_t)inputs[i];
    }
    write_array("i4.npy", PK_INT32, 2, M, IN, words);
    write_array("u2.npy", PK_UINT16, 2, M, IN, shorts);
    write_array("i1.npy", PK_INT8, 2, M, IN, small);
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/plain");
    static const char *const names[] = {"f", "i", "b", "images", "i4", "u2", "i1"};
    for (int i = 0; i < 7; i++) {
        expect(0, "%%/tanh --inputs %%/%s.npy --out %%/typed", names[i]);
        check_all_same("plain", "typed");
    }
    /* Masks. */
    double numbers_of[M * IN];
    for (size_t i = 0; i < M * IN; i++) {
        bytes[i] = inputs[i] > 2;
        numbers_of[i] = bytes[i];
    }
    write_array("mask.npy", PK_BOOL, 2, M, IN, bytes);
    write_array("mask8.npy", PK_FLOAT64, 2, M, IN, numbers_of);
    expect(0, "%%/tanh --inputs %%/mask8.npy --out %%/plain");
    expect(0, "%%/tanh --inputs %%/mask.npy --out %%/typed");
    check_all_same("plain", "typed");
    /* Labels of any integers give what those of int64 give. */
    for (int i = 0; i < M; i++) {
        integers[i] = words[i] = i % OUT;
        small[i] = (int8_t)(i % OUT);
    }
    write_array("l8.npy", PK_INT64, 1, M, 0, integers);
    write_array("l4.npy", PK_INT32, 1, M, 0, words);
    write_array("l1.npy", PK_INT8, 1, M, 0, small);
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/plain --outputs label --labels %%/l8.npy");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/typed --outputs label --labels %%/l4.npy");
    check_all_same("plain", "typed");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/typed --outputs label --labels %%/l1.npy");
    check_all_same("plain", "typed");
}

/* Images whose axes stand in another order hold as many numbers. */
static void test_axes(void **state)
{
    double x[M * WIDE];
    (void)state;
    train("images", "input 1x3x2; conv 2 2x2; tanh; flatten; dense 3", "sgd", 0.1, 3, 0);
    train("vectors", "input 6; dense 3", "sgd", 0.1, 3, 0);
    for (int i = 0; i < M * WIDE; i++)
        x[i] = inputs[i % (M * IN)] + i;
    static const struct {
        const char *name;
        int rank;
        size_t shape[5];
        int fits, fits_vectors;
    } cases[] = {{"a1", 2, {M, 6}, 1, 1},          {"a2", 3, {M, 3, 2}, 1, 1},    {"a3", 4, {M, 1, 3, 2}, 1, 1},
                 {"a4", 4, {M, 3, 2, 1}, 1, 1},    {"a5", 4, {M, 3, 1, 2}, 1, 1}, {"a6", 3, {M, 2, 3}, 0, 0},
                 {"a7", 4, {M, 2, 3, 1}, 0, 0},    {"a8", 4, {M, 1, 2, 3}, 0, 0}, {"a9", 3, {M, 6, 1}, 1, 1},
                 {"a10", 5, {M, 1, 1, 3, 2}, 1, 1}};
    expect(0, "%%/images --inputs %%/%s --out %%/none --recover --unattributed 1 --top 0",
           (write_array("a0.npy", PK_FLOAT64, 2, M, 6, x), "a0.npy"));
    /* The training inputs of a network of vectors, as images: they tell the order. */
    pk_array train_inputs;
    assert_int_equal(pk_array_map(&context, in_root("vectors/train_inputs.npy"), 0, &train_inputs), PK_OK);
    const size_t image[3] = {N, 3, 2}, other[3] = {N, 2, 3};
    static double copy[N * WIDE];
    memcpy(copy, train_inputs.data, sizeof copy);
    pk_array_release(&context, &train_inputs);
    assert_int_equal(pk_array_write(&context, in_root("vectors/train_inputs.npy"), PK_FLOAT64, 3, image, copy),
                     PK_OK);
    expect(0, "%%/vectors --inputs %%/a0.npy --out %%/vectors0");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[200];
        assert_int_equal(pk_array_write(&context, in_root("%s.npy", cases[i].name), PK_FLOAT64, cases[i].rank,
                                        cases[i].shape, x),
                         PK_OK);
        snprintf(line, sizeof line, "%%/images --inputs %%/%s.npy --out %%/axes", cases[i].name);
        if (cases[i].fits) {
            expect(0, "%s", line);
            check_all_same("none", "axes");
        } else {
            expect_refused(line, "the network takes 1x3x2: as many numbers, but in another order of the axes");
        }
        snprintf(line, sizeof line, "%%/vectors --inputs %%/%s.npy --out %%/axes", cases[i].name);
        if (cases[i].fits_vectors) {
            expect(0, "%s", line);
            check_all_same("vectors0", "axes");
        } else {
            expect_refused(line, "the training inputs (40, 3, 2)");
        }
    }
    assert_int_equal(pk_array_write(&context, in_root("images/train_inputs.npy"), PK_FLOAT64, 3, other, copy),
                     PK_OK);
    expect_refused("%/images --inputs %/a0.npy --out %/axes", "in another order of the axes");
}

/* f(w_K, x): what a run gives that was recorded for K steps only, to the bit. */
static void test_until(void **state)
{
    static const struct {
        const char *network, *optimizer;
        int float32;
        size_t keep_every;
    } cases[] = {{"input 4; dense 6; tanh; dense 3", "sgd", 0, 0},
                 {"input 4; dense 6; relu; dense 3", "sgd momentum=0.9 weight_decay=0.01", 0, 0},
                 {"input 4; dense 6; gelu; dense 3", "adamw weight_decay=0.1", 1, 0},
                 {"input 4; dense 6; tanh; dense 3", "adam", 0, 4},
                 {"input 4; dense 6; tanh; dense 3", "sgd", 0, 5}};
    static const size_t ends[] = {0, 1, 3, 7, 8, S};
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char name[40];
        snprintf(name, sizeof name, "until-%zu", c);
        keep_every = cases[c].keep_every;
        train(name, cases[c].network, cases[c].optimizer, 0.05, S, cases[c].float32);
        for (size_t e = 0; e < sizeof ends / sizeof *ends; e++) {
            char shorter[60];
            snprintf(shorter, sizeof shorter, "until-%zu-%zu", c, ends[e]);
            keep_every = cases[c].keep_every;
            train(shorter, cases[c].network, cases[c].optimizer, 0.05, ends[e], cases[c].float32);
            shell("rm -rf until-out until-in");
            expect(0, "%%/%s --inputs %%/x.npy --out %%/until-out --keep step --keep train", shorter);
            expect(0, "%%/%s --inputs %%/x.npy --out %%/until-in --keep step --keep train --until %zu", name,
                   ends[e]);
            check_all_same("until-in", "until-out");
            shell("cmp until-in/by_step.npy until-out/by_step.npy");
            snprintf(shorter, sizeof shorter, "until step %zu of 12", ends[e]);
            assert_non_null(strstr(told, shorter));
        }
    }
    shell("rm -rf until-out && mkdir until-out");
    expect(0, "%%/until-1 --inputs %%/x.npy --out %%/until-out --until 0");
    shell("cmp until-out/initial.npy until-out/final.npy");
    expect_refused("%/until-1 --inputs %/x.npy --out %/no --until 13",
                   "--until: there is no step 13; the run has 12");
    expect_refused("%/until-1 --inputs %/x.npy --out %/no --until -1", "--until: '-1' is not");
    expect_refused("%/until-1 --inputs %/x.npy --out %/no --until last", "--until: 'last' is not");
    expect_refused("%/until-1 --inputs %/x.npy --out %/no --until", "--until needs a value");
    assert_false(exists(in_root("no")));
}

/* Averages of the weights, and runs that begin with an optimizer's state, which have one file more. */
static void test_averages(void **state)
{
    static const char *const averages[] = {"ema:0.9", "ema:0.5:1", "ema:0.5:2:3", "swa:3:2", "swa:0:1"};
    static const size_t shape[2] = {1, 51};
    double velocity[51];
    char text[400];
    (void)state;
    train("averaged", "input 4; dense 6; relu; dense 3", "sgd momentum=0.9 weight_decay=0.01", 0.05, S, 0);
    for (size_t i = 0; i < sizeof averages / sizeof *averages; i++) {
        expect(
            0,
            "%%/averaged --inputs %%/x.npy --out %%/average --keep train --keep step --keep layer --average %s",
            averages[i]);
        snprintf(text, sizeof text, "final is that of an average of the weights, %s", averages[i]);
        assert_non_null(strstr(told, text));
        assert_null(strstr(told, "inherited"));
        assert_false(exists(in_root("average/inherited.npy")));
        check_identity("average", M, OUT, "by_example", N);
        check_identity("average", M, OUT, "by_step", S);
        check_identity("average", M, OUT, "by_layer", 2);
    }
    /* The average of one weight is that weight; labels are the average's. */
    expect(0, "%%/averaged --inputs %%/x.npy --out %%/average --average swa:7:100");
    expect(0, "%%/averaged --inputs %%/x.npy --out %%/until-in --until 7");
    shell("cmp average/final.npy until-in/final.npy && cmp average/initial.npy until-in/initial.npy");
    expect(0, "%%/averaged --inputs %%/x.npy --out %%/average --average swa:7:100 --outputs label");
    expect(0, "%%/averaged --inputs %%/x.npy --out %%/until-in --until 7 --outputs label");
    shell("cmp average/final.npy until-in/final.npy");
    static const char *const wrong[][2] = {
        {"ema", "--average: 'ema' is no average; these are ema:BETA, "},
        {"ema:1", "--average: 'ema:1': BETA is 1; it must be in [0, 1)"},
        {"swa:3", "--average: 'swa:3' is no average"},
        {"swa:3:0", "--average: 'swa:3:0' is no average"},
        {"swa:13:1", "--average: the average starts after step 13; there are 12 steps"},
        {"ema:0.9:8 --until 7", "--average: the average starts after step 8; there are 7 steps"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        snprintf(text, sizeof text, "%%/averaged --inputs %%/x.npy --out %%/no --average %s", wrong[i][0]);
        expect_refused(text, wrong[i][1]);
    }
    assert_false(exists(in_root("no")));
    /* A velocity to begin with; it is not the run's, so that much is unattributed. */
    for (size_t i = 0; i < 51; i++)
        velocity[i] = 0.01 * (double)(i % 7);
    assert_int_equal(
        pk_array_write(&context, in_root("averaged/initial_state.npy"), PK_FLOAT64, 2, shape, velocity), PK_OK);
    expect_refused("%/averaged --inputs %/x.npy --out %/no", "run.txt has no initial_step line");
    shell("echo 'initial_step 5' >> averaged/run.txt");
    expect(1, "%%/averaged --inputs %%/x.npy --out %%/average");
    assert_non_null(strstr(told, "it begins with an optimizer's state, after 5 updates"));
    assert_non_null(strstr(told, ", inherited "));
    assert_true(exists(in_root("average/inherited.npy")));
    expect(1, "%%/averaged --inputs %%/x.npy --out %%/average --average ema:0.9:3");
    assert_true(exists(in_root("average/inherited.npy")));
    /* Where it is left from an older job, the summary tells. */
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/average");
    assert_non_null(strstr(told, "average/inherited.npy is of an older decomposition"));
    shell("rm averaged/initial_state.npy");
    expect_refused("%/averaged --inputs %/x.npy --out %/no", "initial_state.npy is missing: run.txt has");
}

/* Files of another number of steps are no run that was killed. */
static void test_recover(void **state)
{
    static const struct {
        const char *name;
        size_t rows;
        const char *says;
        size_t steps;
    } cases[] = {{"learning_rates", 1, "learning_rates.npy holds 1 row, weights.npy holds 13 rows", 1},
                 {"learning_rates", 4, "learning_rates.npy holds 4 rows, weights.npy holds 13 rows", 4},
                 {"learning_rates", 11, "learning_rates.npy holds 11 rows, weights.npy holds 13 rows", 11},
                 {"gradient_scales", 1, "gradient_scales.npy holds 1 row, weights.npy holds 13 rows", 1},
                 {"batch_offsets", 3, "batch_offsets.npy holds 3 rows, weights.npy holds 13 rows", 2}};
    const double rates[S] = {0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5};
    const int64_t offsets[3] = {0, 16, 32};
    char line[300];
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        shell("rm -rf mistake && cp -r tanh mistake");
        snprintf(line, sizeof line, "mistake/%s.npy", cases[i].name);
        if (i < 4)
            write_array(line, PK_FLOAT64, 1, cases[i].rows, 0, rates);
        else
            write_array(line, PK_INT64, 1, cases[i].rows, 0, offsets);
        expect_refused("%/mistake --inputs %/x.npy --out %/no", cases[i].says);
        expect_refused("%/mistake --inputs %/x.npy --out %/no", "--recover");
        assert_false(exists(in_root("no")));
        shell("rm -rf recovered whole");
        expect(
            i == 3,
            "%%/mistake --inputs %%/x.npy --out %%/recovered --recover"); /* half of its gradient is missing */
        snprintf(line, sizeof line, "recording was cut off: %zu steps are complete", cases[i].steps);
        assert_non_null(strstr(told, line));
        if (i == 3)
            continue;
        expect(0, "%%/tanh --inputs %%/x.npy --out %%/whole --until %zu", cases[i].steps);
        check_all_same("recovered", "whole");
    }
    /* What a kill leaves opens without being asked. */
    shell("rm -rf mistake && cp -r tanh mistake && truncate -s -7 mistake/weights.npy");
    expect(0, "%%/mistake --inputs %%/x.npy --out %%/recovered");
    assert_non_null(strstr(told, "recording was cut off: 11 steps are complete"));
}

static void test_not_closed(void **state)
{
    (void)state;
    expect(1, "%%/tanh --inputs %%/x.npy --out %%/left --quadrature left");
    assert_non_null(strstr(complained, "not closed: closure "));
    assert_non_null(strstr(told, "\nNOT CLOSED\n"));
    check_identity("left", M, OUT, "by_example", N);
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/left --quadrature left --tolerance 100");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/gauss --quadrature gauss:16");
    expect(1, "%%/tanh --inputs %%/x.npy --out %%/midpoint --quadrature midpoint:3 --tolerance %s",
           EITHER("1e-10", "1e-6"));
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/trapezoid --quadrature trapezoid:200 --tolerance 1e-3");
    expect(0, "%%/relu --inputs %%/x.npy --out %%/exact --quadrature exact --tolerance %s",
           EITHER("1e-13", "1e-5"));
}

static void test_bounds(void **state)
{
    (void)state;
    expect(0, "%%/relu --inputs %%/x.npy --out %%/bounds --bounds --top 0");
    pk_array bounds = result(in_root("bounds/bounds.npy"), M, OUT, N, 0);
    for (size_t i = 0; i < pk_array_items(&bounds); i++)
        assert_true(numbers(&bounds)[i] >= 0 && numbers(&bounds)[i] < EITHER(1e-8, 2e-3));
    pk_array_release(&context, &bounds);
    expect(0, "%%/relu --inputs %%/x.npy --out %%/unbounded");
    pk_array with = result(in_root("bounds/by_example.npy"), M, OUT, N, 0);
    pk_array without = result(in_root("unbounded/by_example.npy"), M, OUT, N, 0);
    for (size_t i = 0; i < pk_array_items(&with); i++)
        assert_true(fabs(numbers(&with)[i] - numbers(&without)[i]) < ROUNDING(1e-12));
    pk_array_release(&context, &with);
    pk_array_release(&context, &without);
}

static void test_no_steps(void **state)
{
    pk_array array;
    (void)state;
    expect(0, "%%/still --inputs %%/x.npy --out %%/none --keep step --keep train");
    assert_int_equal(pk_array_map(&context, in_root("none/by_step.npy"), 0, &array), PK_OK);
    assert_int_equal(array.rank, 3);
    assert_true(array.shape[0] == M && array.shape[1] == OUT && array.shape[2] == 0);
    pk_array_release(&context, &array);
    check_identity("none", M, OUT, "by_example", N);
}

/* ---- what it prints ------------------------------------------------------------------------------------ */

static size_t occurrences(const char *text, const char *words)
{
    size_t count = 0;
    for (; (text = strstr(text, words)) != NULL; text++)
        count++;
    return count;
}

static void test_printed(void **state)
{
    (void)state;
    expect(0, "--help");
    assert_non_null(strstr(told, "--quadrature RULE"));
    assert_string_equal(complained, "");
    expect(0, "--version");
    assert_string_equal(told, "pathkernel-decompose " PK_VERSION "\n");
    expect(0, "%%/relu --inputs %%/x.npy --out %%/printed");
    assert_int_equal(occurrences(told, "\ninput "), 10); /* of 23 */
    assert_int_equal(occurrences(told, "\n  for "), 10);
    expect(0, "%%/relu --inputs %%/x.npy --out %%/printed --top 2 --keep layer");
    assert_int_equal(occurrences(told, "\ninput "), M);
    expect(0, "%%/relu --inputs %%/x.npy --out %%/printed --top 0");
    assert_int_equal(occurrences(told, "\ninput "), 0);
    expect(0, "%%/relu --inputs %%/x.npy --out %%/printed --top 1000000 --verbose");
    assert_non_null(strstr(complained, "plan: "));
    assert_non_null(strstr(complained, "23 of 23 inputs complete"));

    /* Layers are counted as by_layer has them. */
    train("tied", "input 4; dense 4 name=a; tanh; dense 4 tied=a; tanh; dense 3", "sgd", 0.1, 3, 0);
    expect(0, "%%/tied --inputs %%/x.npy --out %%/printed --keep layer");
    assert_non_null(strstr(told, " 3 steps, 2 layers, 35 parameters"));
    pk_array by_layer = result(in_root("printed/by_layer.npy"), M, OUT, 2, 0);
    pk_array_release(&context, &by_layer);

    /* The strongest example of the first input, against the file. */
    expect(0, "%%/relu --inputs %%/x.npy --out %%/printed --outputs 1 --top 1");
    pk_array by_example = result(in_root("printed/by_example.npy"), M, 1, N, 0);
    size_t strongest = 0;
    char wanted[100];
    for (size_t i = 1; i < N; i++)
        strongest = numbers(&by_example)[i] > numbers(&by_example)[strongest] ? i : strongest;
    snprintf(wanted, sizeof wanted, "  for      %zu (%zu) %+.4g\n", strongest, strongest % OUT,
             numbers(&by_example)[strongest]);
    assert_non_null(strstr(told, wanted));
    pk_array_release(&context, &by_example);

    /* Where standard output is full, the results are there and the status says so. */
    if (exists("/dev/full")) {
        sent_to = "/dev/full";
        int status = finish(start("%/tanh --inputs %/x.npy --out %/unsaid"));
        sent_to = NULL;
        assert_int_equal(status, 2);
        assert_non_null(strstr(complained, "summary could not be written"));
        check_identity("unsaid", M, OUT, "by_example", N);
    }
}

/* A manifest that declares another optimiser than the one that trained. */
static void test_wrong_optimizer(void **state)
{
    (void)state;
    expect(0, "%%/relu --inputs %%/x.npy --out %%/right");
    assert_null(strstr(told, "does not describe"));
    expect(0, "%%/adamw --inputs %%/x.npy --out %%/right"); /* float32: rounding, and no complaint */
    assert_null(strstr(told, "does not describe"));
    shell("cp -r relu forgotten && sed -i 's/momentum=0.9//' forgotten/run.txt");
    shell("cp -r adamw decay && sed -i 's/weight_decay=[^ ]*/weight_decay=0.5/' decay/run.txt");
    shell("cp -r relu lighter && sed -i 's/weight_decay=[^ ]*/weight_decay=0.0099/' lighter/run.txt");
    shell("cp -r tanh sums && sed -i 's/softmax_cross_entropy/squared/' sums/run.txt");
    shell("cp -r adamw coupled && sed -i 's/adamw/adam/' coupled/run.txt");
    shell("cp -r tanh faster && cp -r tanh weighted && cp -r relu clipped");
    double rates[S], scales[S], weights[S * 16];
    for (int s = 0; s < S; s++)
        rates[s] = 0.5 * (1 + 1e-6), scales[s] = 0.999;
    for (int i = 0; i < S * 16; i++)
        weights[i] = 1; /* a sum, not a mean */
    write_array("faster/learning_rates.npy", PK_FLOAT64, 1, S, 0, rates);
    write_array("clipped/gradient_scales.npy", PK_FLOAT64, 1, S, 0, scales);
    pk_array items;
    assert_int_equal(pk_array_map(&context, in_root("tanh/batch_items.npy"), 0, &items), PK_OK);
    assert_true(items.shape[0] <= S * 16);
    write_array("weighted/batch_weights.npy", PK_FLOAT64, 1, items.shape[0], 0, weights);
    pk_array_release(&context, &items);
    static const char *const wrong[] = {"forgotten", "decay",  "lighter",  "sums",
                                        "coupled",   "faster", "weighted", "clipped"};
    for (int i = 0; i < 8; i++) {
        if (EITHER(0, 1) && (i == 2 || i == 5)) /* below the rounding of float */
            continue;
        shell("rm -rf wrong");
        expect(1, "%%/%s --inputs %%/x.npy --out %%/wrong", wrong[i]); /* it closes all the same */
        if (strncmp(complained, "pathkernel-decompose: unattributed ", 35) != 0 ||
            !strstr(complained, "the declared training") ||
            strchr(complained, '\n') != complained + strlen(complained) - 1)
            fail_msg("%s: %s", wrong[i], complained);
        assert_non_null(strstr(told, "\nclosed, but NOT EXPLAINED by the declared training\n"));
        check_identity("wrong", M, OUT, "by_example", N);
        expect(0, "%%/%s --inputs %%/x.npy --out %%/wrong --unattributed 100", wrong[i]);
        assert_string_equal(complained, "");
    }
    expect(1, "%%/relu --inputs %%/x.npy --out %%/wrong --unattributed 1e-30");
    assert_non_null(strstr(complained, "exceeds 1e-30"));
    /* Both are said in the one line. */
    expect(1, "%%/forgotten --inputs %%/x.npy --out %%/wrong --quadrature left");
    assert_non_null(strstr(complained, "not closed: closure "));
    assert_non_null(strstr(complained, "; and unattributed "));
    assert_int_equal(strchr(complained, '\n') - complained, strlen(complained) - 1);
    /* float32 that is stored as float64 leaves what float32 leaves. */
    pk_array given;
    static double as_double[200 * (S + 1)];
    assert_int_equal(pk_array_map(&context, in_root("adamw/weights.npy"), 0, &given), PK_OK);
    const size_t shape[2] = {given.shape[0], given.shape[1]};
    assert_true(given.type == PK_FLOAT32 && pk_array_items(&given) <= sizeof as_double / sizeof *as_double);
    for (size_t i = 0; i < pk_array_items(&given); i++)
        as_double[i] = (double)((const float *)given.data)[i];
    pk_array_release(&context, &given);
    shell("cp -r adamw stored");
    assert_int_equal(pk_array_write(&context, in_root("stored/weights.npy"), PK_FLOAT64, 2, shape, as_double),
                     PK_OK);
    expect(0, "%%/stored --inputs %%/x.npy --out %%/wrong");
}

/* ---- bad input ----------------------------------------------------------------------------------------- */

static void test_bad_arguments(void **state)
{
    static const struct {
        const char *arguments, *words;
    } cases[] = {
        {"", "no run directory"},
        {"%/tanh", "--inputs X.npy is missing"},
        {"%/tanh --inputs %/x.npy", "--out DIR is missing"},
        {"%/tanh --inputs %/x.npy --out", "--out needs a value"},
        {"%/tanh --inputs --out %/no", "--inputs needs a value"},
        {"%/tanh --inputs= --out %/no", "--inputs needs a value"},
        {"%/tanh %/relu --inputs %/x.npy --out %/no", "only one run"},
        {"%/tanh --inputs %/x.npy --out %/no --fast", "unknown option '--fast'"},
        {"%/tanh --inputs %/x.npy --out %/no -t 2", "unknown option '-t'"},
        {"%/tanh --inputs %/x.npy --out %/no --outputsall", "unknown option '--outputsall'"},
        {"%/tanh --inputs %/x.npy --out %/no --keep everything", "--keep: 'everything' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --keep train,", "--keep: 'train,' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --outputs 3", "--outputs: there is no output 3"},
        {"%/tanh --inputs %/x.npy --out %/no --outputs -1", "--outputs: '-1' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --outputs 99999999999999999999999", "--outputs: '9999"},
        {"%/tanh --inputs %/x.npy --out %/no --outputs labels", "--outputs: 'labels' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature simpson", "--quadrature: 'simpson' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature gauss", "--quadrature: 'gauss' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature gauss:", "--quadrature: 'gauss:' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature gauss:0", "--quadrature: 'gauss:0' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature gauss:4x", "--quadrature: 'gauss:4x' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature gauss:1000", "--quadrature: "},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature auto:4", "--quadrature: 'auto:4' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature exact", "--quadrature: the exact rule needs"},
        {"%/tanh --inputs %/x.npy --out %/no --quadrature trapezoid:1", "--quadrature: "},
        {"%/tanh --inputs %/x.npy --out %/no --tolerance 0", "--tolerance: '0' is not a positive"},
        {"%/tanh --inputs %/x.npy --out %/no --tolerance nan", "--tolerance: 'nan' is not a positive"},
        {"%/tanh --inputs %/x.npy --out %/no --tolerance 1e-10x", "--tolerance: '1e-10x' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --tolerance 1e999", "--tolerance: '1e999' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --unattributed 0", "--unattributed: '0' is not a positive"},
        {"%/tanh --inputs %/x.npy --out %/no --unattributed -1", "--unattributed: '-1' is not a positive"},
        {"%/tanh --inputs %/x.npy --out %/no --unattributed nan", "--unattributed: 'nan' is not a positive"},
        {"%/tanh --inputs %/x.npy --out %/no --unattributed", "--unattributed needs a value"},
        {"%/tanh --inputs %/x.npy --out %/no --top -3", "--top: '-3' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --threads 0", "--threads: '0' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --threads 1000000", "--threads: '1000000' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --rows-at-once 0", "--rows-at-once: '0' is not"},
        {"%/tanh --inputs %/x.npy --out %/no --memory 0", "--memory: '0' is not a size"},
        {"%/tanh --inputs %/x.npy --out %/no --memory -1G", "--memory: '-1G' is not a size"},
        {"%/tanh --inputs %/x.npy --out %/no --memory 2X", "--memory: '2X' is not a size"},
        {"%/tanh --inputs %/x.npy --out %/no --memory 99999999999T", "--memory: '99999999999T' is not a size"},
        {"%/tanh --inputs %/x.npy --out %/no --memory 1K", "within 1024 bytes is not possible; the least"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_refused(cases[i].arguments, cases[i].words);
        assert_false(exists(in_root("no")));
    }
}

static void test_bad_files(void **state)
{
    double values[M * IN];
    int64_t labels[M] = {0};
    (void)state;
    memcpy(values, inputs, sizeof values);
    values[5 * IN + 2] = NAN;
    write_array("nan.npy", PK_FLOAT64, 2, M, IN, values);
    values[5 * IN + 2] = (double)INFINITY;
    write_array("infinite.npy", PK_FLOAT64, 2, M, IN, values);
    write_array("wide.npy", PK_FLOAT64, 2, IN, M, inputs);
    write_array("flat.npy", PK_FLOAT64, 1, IN, 0, inputs);
    write_array("empty.npy", PK_FLOAT64, 2, 0, IN, inputs);
    write_array("few.npy", PK_INT64, 1, M - 1, 0, labels);
    write_array("real.npy", PK_FLOAT64, 1, M, 0, inputs);
    labels[4] = OUT;
    write_array("high.npy", PK_INT64, 1, M, 0, labels);
    shell("head -c 300 x.npy >short.npy; head -c 20 x.npy >header.npy; : >nothing.npy; echo hello >text.npy");
    shell("for r in a b c d e f; do cp -r tanh bad-$r; done; rm bad-a/run.txt; echo 'speed 9' >>bad-b/run.txt;"
          "truncate -s 200 bad-c/weights.npy; rm bad-d/batch_items.npy; sed -i 's/dense 6/dense 7/' "
          "bad-e/run.txt;"
          "printf '\\0\\0\\0\\0\\0\\0\\370\\177' | dd of=bad-f/weights.npy bs=1 conv=notrunc"
          " seek=$(($(wc -c <bad-f/weights.npy) - 8)) 2>/dev/null; mkdir bad-g");
    static const struct {
        const char *arguments, *words;
    } cases[] = {
        {"%/gone --inputs %/x.npy --out %/no", "/gone/run.txt: No such file"},
        {"%/x.npy --inputs %/x.npy --out %/no", "/x.npy"},
        {"%/bad-a --inputs %/x.npy --out %/no", "/bad-a/run.txt: No such file"},
        {"%/bad-b --inputs %/x.npy --out %/no", "unknown key 'speed'"},
        {"%/bad-c --inputs %/x.npy --out %/no", "weights.npy"},
        {"%/bad-d --inputs %/x.npy --out %/no", "batch_items.npy"},
        {"%/bad-e --inputs %/x.npy --out %/no", "weights.npy"},
        {"%/bad-f --inputs %/x.npy --out %/no", "weights.npy"},
        {"%/bad-g --inputs %/x.npy --out %/no", "/bad-g/run.txt: No such file"},
        {"%/tanh --inputs %/gone.npy --out %/no", "/gone.npy: cannot be opened: No such file"},
        {"%/tanh --inputs %/tanh --out %/no", "is a directory"},
        {"%/tanh --inputs %/short.npy --out %/no", "short.npy"},
        {"%/tanh --inputs %/header.npy --out %/no", "header.npy"},
        {"%/tanh --inputs %/nothing.npy --out %/no", "nothing.npy"},
        {"%/tanh --inputs %/text.npy --out %/no", "text.npy"},
        {"%/tanh --inputs %/wide.npy --out %/no",
         "wide.npy has shape (4, 23), rows of 23 numbers; the network takes 4"},
        {"%/tanh --inputs %/flat.npy --out %/no", "one input has shape (1, ...)"},
        {"%/tanh --inputs %/empty.npy --out %/no", "empty.npy has shape (0, 4): no inputs"},
        {"%/tanh --inputs %/nan.npy --out %/no", "nan.npy: row 5, number 2 is NaN"},
        {"%/tanh --inputs %/infinite.npy --out %/no", "infinite.npy: row 5, number 2 is infinite"},
        {"%/tanh --inputs %/x.npy --labels %/gone.npy --out %/no", "--labels: "},
        {"%/tanh --inputs %/x.npy --labels %/few.npy --out %/no",
         "few.npy has shape (22,); 23 inputs need (23,)"},
        {"%/tanh --inputs %/x.npy --labels %/real.npy --out %/no", "real.npy has type float64"},
        {"%/tanh --inputs %/x.npy --labels %/high.npy --out %/no", "high.npy: label 3 in row 4"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_refused(cases[i].arguments, cases[i].words);
        assert_false(exists(in_root("no")));
    }
}

static void test_unwritable(void **state)
{
    (void)state;
    expect_refused("%/tanh --inputs %/x.npy --out %/x.npy", "there is a file of that name");
    expect_refused("%/tanh --inputs %/x.npy --out %/x.npy/below", "/x.npy/below: the folder cannot be made");
    if (exists("/proc/self"))
        expect_refused("%/tanh --inputs %/x.npy --out /proc", "/proc");
    shell("mkdir -p taken/closure.npy.part");
    expect_refused("%/tanh --inputs %/x.npy --out %/taken", "closure.npy.part: cannot be made: Is a directory");
    assert_false(exists(in_root("taken/by_example.npy.part")));
    shell("mkdir locked && chmod 555 locked");
    if (geteuid() != 0) /* nothing is locked to root */
        expect_refused("%/tanh --inputs %/x.npy --out %/locked", "/locked: the folder cannot be written");
}

/* ---- cut short ----------------------------------------------------------------------------------------- */

/* The rows that the message counts as complete are in all files, equal to those of the whole job. */
static size_t check_complete(const char *text, const char *folder, size_t rows)
{
    char counted[60];
    const char *found = strstr(text, " inputs are complete, rows 0 to ");
    assert_non_null(found);
    size_t last = (size_t)strtoull(found + 32, NULL, 10), complete = last + 1;
    snprintf(counted, sizeof counted, " %zu of %zu inputs are complete", complete, rows);
    if (!strstr(text, counted))
        fail_msg("%s", text);
    check_identity(folder, complete, OUT, "by_example", N);
    check_no_parts(folder);
    return complete;
}

#ifdef __has_feature
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER
#endif
#endif

static void test_full_disk(void **state)
{
    (void)state;
#ifdef THREAD_SANITIZER
    print_message("skipped: the thread sanitizer's runtime needs larger files itself than this test allows\n");
    skip();
#endif
    expect(0, "%%/tanh --inputs %%/200.npy --out %%/whole --top 0");
    file_limit = 100000; /* of 200 * 3 * 40 * 8: 8 passes of 13 rows fit */
    expect(2, "%%/tanh --inputs %%/200.npy --out %%/full --top 0 --rows-at-once 13");
    assert_non_null(strstr(complained, "by_example.npy"));
    assert_int_equal(check_complete(complained, "full", 200), 104);
    check_all_same("full", "whole");

    /* Nothing complete: an older decomposition stays as it was. */
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/older");
    file_limit = 4000;
    expect(2, "%%/relu --inputs %%/200.npy --out %%/older --top 0");
    file_limit = 4000;
    expect(2, "%%/relu --inputs %%/200.npy --out %%/newer --top 0");
    check_no_parts("older");
    assert_false(exists(in_root("newer")));
    check_identity("older", M, OUT, "by_example", N);
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/same");
    check_all_same("older", "same");
}

#ifdef __linux__
static int put(const char *path, const char *text)
{
    int file = open(path, O_WRONLY);
    int done = file >= 0 && write(file, text, strlen(text)) == (ssize_t)strlen(text);
    if (file >= 0)
        close(file);
    return done;
}

/* In a child: a small file system of its own on root/small, where the machine allows that. */
static int small_disk(void)
{
    char users[40], groups[40];
    const int user = geteuid() != 0;
    snprintf(users, sizeof users, "0 %lu 1", (unsigned long)geteuid());
    snprintf(groups, sizeof groups, "0 %lu 1", (unsigned long)getegid());
    if (unshare(CLONE_NEWNS | (user ? CLONE_NEWUSER : 0)) ||
        (user && (!put("/proc/self/setgroups", "deny") || !put("/proc/self/uid_map", users) ||
                  !put("/proc/self/gid_map", groups))))
        return 77;
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("tmpfs", in_root("small"), "tmpfs", 0, "size=128k"))
        return 77;
    expect(2, "%%/tanh --inputs %%/200.npy --out %%/small --top 0 --rows-at-once 16");
    if (!strstr(complained, "No space left on device"))
        return 1;
    size_t complete = check_complete(complained, "small", 200);
    check_all_same("small", "whole");
    return complete > 0 && complete < 200 ? 0 : 1;
}

static void test_small_disk(void **state)
{
    int status = 0;
    (void)state;
    shell("mkdir small");
    expect(0, "%%/tanh --inputs %%/200.npy --out %%/whole --top 0");
    fflush(stdout);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        setenv("CMOCKA_TEST_ABORT", "1", 1); /* a failure in here must not go on with the other tests */
        _exit(small_disk());
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        print_message("this machine lets nobody mount a small file system\n");
        skip();
    }
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}
#endif

/* Waits until its standard error has the words; the time limit is for a broken program only. */
static void wait_for(const char *words)
{
    for (int i = 0; i < 12000; i++) {
        read_text(in_root("stderr"), complained);
        if (strstr(complained, words))
            return;
        usleep(10000);
    }
    fail_msg("'%s' never came: %s", words, complained);
}

static void test_cancel(void **state)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    (void)state;
    expect(0, "%%/relu --inputs %%/200.npy --out %%/whole --top 0 --threads 1");
    for (int i = 0; i < 3; i++) {
        shell(": >stderr");
        pid_t child =
            start("%/relu --inputs %/long.npy --out %/cut --top 0 --rows-at-once 16 --threads 1 --verbose");
        wait_for(" inputs complete, after");
        kill(child, signals[i]);
        assert_int_equal(finish(child), 2);
        assert_string_equal(told, "");
        size_t complete = check_complete(strstr(complained, "cancelled: "), "cut", LONG);
        assert_true(complete % 16 == 0 && complete < LONG);
    }
    /* Row for row what an uncut job gives. */
    expect(0, "%%/relu --inputs %%/200.npy --out %%/first --top 0 --rows-at-once 16");
    check_all_same("first", "whole");
    pk_array cut, whole;
    assert_int_equal(pk_array_map(&context, in_root("cut/by_example.npy"), 0, &cut), PK_OK);
    assert_int_equal(pk_array_map(&context, in_root("whole/by_example.npy"), 0, &whole), PK_OK);
    size_t rows = cut.shape[0] < whole.shape[0] ? cut.shape[0] : whole.shape[0];
    assert_memory_equal(cut.data, whole.data, rows * cut.row_items * sizeof(double));
    pk_array_release(&context, &cut);
    pk_array_release(&context, &whole);
}

/* On a terminal: a progress line with an estimate, and Ctrl-C. */
static void test_terminal(void **state)
{
    char text[TEXT] = "";
    size_t used = 0;
    int status = 0, sent = 0;
    (void)state;
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal < 0 || grantpt(terminal) || unlockpt(terminal)) {
        print_message("this machine has no pseudo terminals\n");
        skip();
    }
    const char *name = ptsname(terminal);
    fflush(stdout);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        default_signals();
        setsid();
        int own = open(name, O_RDWR);
        if (own < 0 || ioctl(own, TIOCSCTTY, 0) || dup2(own, STDIN_FILENO) < 0 ||
            dup2(own, STDERR_FILENO) < 0 || !freopen("/dev/null", "w", stdout))
            _exit(97);
        execl(program, program, in_root("relu"), "--inputs", in_root("long.npy"), "--out", in_root("shown"),
              "--top", "0", "--rows-at-once", "64", "--threads", "1", (char *)NULL);
        _exit(98);
    }
    for (;;) {
        ssize_t got = read(terminal, text + used, sizeof text - 1 - used);
        if (got <= 0)
            break;
        used += (size_t)got;
        text[used] = 0;
        if (!sent && strstr(text, " left")) {
            sent = 1;
            assert_int_equal(write(terminal, "\003", 1), 1);
        }
        if (used > sizeof text / 2 && !strstr(text, "cancelled")) { /* keep the end */
            memmove(text, text + used / 2, used - used / 2 + 1);
            used -= used / 2;
        }
    }
    close(terminal);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 97)
        skip();
    if (WEXITSTATUS(status) != 2 || !sent || !strstr(text, " inputs, ") || !strstr(text, " %") ||
        !strstr(text, "stopping"))
        fail_msg("status %d: %s", WEXITSTATUS(status), text);
    (void)check_complete(strstr(text, "cancelled: "), "shown", LONG);
}

/* ---- whatever stands in its way ------------------------------------------------------------------------ */

/* Without standard input, output or error: the results hold nothing that is printed. */
static void test_closed_streams(void **state)
{
    (void)state;
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/streams0 --bounds --step-closure --keep step --keep train");
    for (int closed = 1; closed < 8; closed++) {
        shell("rm -rf streams");
        closed_streams = closed;
        expect(0,
               "%%/tanh --inputs %%/x.npy --out %%/streams --bounds --step-closure --keep step --keep train");
        check_all_same("streams0", "streams");
        shell("cmp streams0/bounds.npy streams/bounds.npy && cmp streams0/by_step.npy streams/by_step.npy && "
              "cmp streams0/closure_by_step.npy streams/closure_by_step.npy");
    }
}

/* One program at a time writes a folder. */
static void test_one_folder(void **state)
{
    (void)state;
    expect(0, "%%/relu --inputs %%/x.npy --out %%/shared");
    shell("cp -r shared shared0; : >stderr");
    pid_t child =
        start("%/tanh --inputs %/long.npy --out %/shared --top 0 --rows-at-once 16 --threads 1 --verbose");
    wait_for(" inputs complete, after");
    sent_to = in_root("other");
    char line[1400];
    snprintf(line, sizeof line,
             "'%.300s' '%.200s/relu' --inputs '%.200s/x.npy' --out '%.200s/shared' 2>'%.100s/second'", program,
             root, root, root, root);
    int status = system(line);
    sent_to = NULL;
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 2);
    read_text(in_root("second"), complained);
    assert_non_null(strstr(complained, "/shared is being written by another program"));
    check_all_same("shared", "shared0"); /* still */
    kill(child, SIGKILL);
    assert_int_equal(wait_killed(child, &status), child);
    check_all_same("shared", "shared0");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/shared");
    check_no_parts("shared");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/shared1");
    check_all_same("shared", "shared1");
}

/* Pipes, links, devices and folders in the places of files: refused at once, untouched; a result's name that is a link is
 * given to the result. */
static void test_places(void **state)
{
    (void)state;
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/places0");
    static const char *const commands[] = {
        "mkfifo places/closure.npy.part", "ln -s ../victim places/closure.npy.part",
        "ln -s nowhere places/closure.npy.part", "ln -s /dev/full places/closure.npy.part"};
    static const char *const says[] = {"closure.npy.part: is a device or a pipe, not a file",
                                       "closure.npy.part: is a symbolic link, not a file",
                                       "closure.npy.part: is a symbolic link, not a file",
                                       "closure.npy.part: is a symbolic link, not a file"};
    char line[300];
    for (int i = 0; i < 4; i++) {
        shell("rm -rf places && cp -r places0 places && echo letters >victim");
        shell(commands[i]);
        expect_refused("%/relu --inputs %/x.npy --out %/places", says[i]);
        check_all_same("places0", "places");
        shell("test \"$(cat victim)\" = letters && test ! -e places/nowhere && test ! -e nowhere");
        shell("test -p places/closure.npy.part -o -L places/closure.npy.part"); /* not ours to remove */
        assert_false(exists(in_root("places/by_example.npy.part")));
        assert_false(exists(in_root("places/.pathkernel")));
    }
    shell("rm -rf places && mkdir places && ln -s ../victim places/final.npy && ln -s /dev/null "
          "places/decay.npy && "
          "mkfifo places/initial.npy");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/places");
    check_all_same("places0", "places");
    shell("test \"$(cat victim)\" = letters && test ! -L places/final.npy");
    shell("rm -rf places && cp -r places0 places && rm places/decay.npy && mkdir places/decay.npy && cp -r "
          "places "
          "places1");
    expect(2, "%%/relu --inputs %%/x.npy --out %%/places --top 0");
    assert_non_null(strstr(complained, "decay.npy: cannot be replaced: Is a directory"));
    shell("diff -r places places1");
    shell("rm -rf places && mkdir places && echo letters >places/.pathkernel");
    expect_refused("%/tanh --inputs %/x.npy --out %/places", ".pathkernel: cannot be made");
    shell("test \"$(cat places/.pathkernel)\" = letters");
    shell("rm -rf places others && mkdir -p places others/new others/old && echo letters >others/current && "
          "echo letters >others/new/one && ln -s ../others places/.pathkernel && cp -r others others0");
    expect_refused("%/tanh --inputs %/x.npy --out %/places", ".pathkernel: cannot be made");
    shell("diff -r others others0 && test -L places/.pathkernel");
    /* What is read. */
    static const char *const files[] = {"run.txt", "weights.npy", "train_inputs.npy", "batch_items.npy",
                                        "gradient_scales.npy"};
    for (int i = 0; i < 5; i++)
        for (int kind = 0; kind < 4; kind++) {
            static const char *const kinds[] = {"mkfifo", "mkdir", "ln -s /dev/zero", "ln -s nowhere"};
            snprintf(line, sizeof line, "rm -rf waits && cp -r tanh waits && rm -f waits/%s && %s waits/%s",
                     files[i], kinds[kind], files[i]);
            shell(line);
            expect_refused("%/waits --inputs %/x.npy --out %/no", files[i]);
        }
    shell("rm -rf waits && mkfifo pipe.npy");
    expect_refused("%/tanh --inputs %/pipe.npy --out %/no", "pipe.npy: is a device or a pipe");
    expect_refused("%/tanh --inputs /dev/zero --out %/no", "/dev/zero: is a device or a pipe");
    expect_refused("%/tanh --inputs %/x.npy --labels %/pipe.npy --out %/no", "pipe.npy: is a device or a pipe");
    assert_false(exists(in_root("no")));
}

/* Files that become shorter while they are read: a line that names the file, and the older decomposition whole. */
static void test_shrinking(void **state)
{
    static const struct {
        const char *command, *says;
    } cases[] = {
        {"truncate -s 0 shrinks/train_inputs.npy", "train_inputs.npy became shorter while it was read"},
        {"truncate -s 0 shrinks/weights.npy", "weights.npy: the row of step"},
        {"truncate -s 5000 shrinks.npy", "inputs: the file became shorter while it was read"}};
    (void)state;
    for (int i = 0; i < 3; i++) {
        shell("rm -rf shrinks shrunk && cp -r relu shrinks && cp long.npy shrinks.npy; : >stderr");
        expect(0, "%%/tanh --inputs %%/x.npy --out %%/shrunk");
        shell("rm -rf shrunk0 && cp -r shrunk shrunk0");
        pid_t child =
            start("%/shrinks --inputs %/shrinks.npy --out %/shrunk --top 0 --rows-at-once 16 --threads 1 "
                  "--verbose");
        wait_for(" inputs complete, after");
        shell(cases[i].command);
        assert_int_equal(finish(child), 2);
        if (!strstr(complained, cases[i].says))
            fail_msg("case %d: %s", i, complained);
        if (i == 0)
            check_all_same("shrunk", "shrunk0");
        expect(0, "%%/tanh --inputs %%/x.npy --out %%/shrunk");
        check_no_parts("shrunk");
    }
    shell("rm -rf shrinks shrinks.npy");
}

/* Inputs of 512 MB take no memory of their own. */
static void test_memory_of_inputs(void **state)
{
    enum { ROWS = 1 << 24 };
    const size_t shape[2] = {ROWS, IN};
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    print_message("skipped: sanitizers take memory of their own\n");
    skip();
#endif
    pk_array_writer writer;
    memset(&writer, 0, sizeof writer);
    assert_int_equal(pk_array_create(&context, in_root("huge.npy"), PK_FLOAT64, 2, shape + 1, &writer), PK_OK);
    const size_t header = writer.header_bytes;
    assert_int_equal(pk_array_close(&context, &writer), PK_OK);
    /* Zeros that take no room on the disk, and one number that is none at the very end. */
    const double nan = (double)NAN;
    char text[200];
    int file = open(in_root("huge.npy"), O_RDWR);
    assert_true(file >= 0);
    ssize_t got = pread(file, text, header < sizeof text ? header : sizeof text, 0);
    assert_true(got > 0);
    char *count = strstr(text + 10, "0, 4)");
    assert_non_null(count);
    memcpy(count - 7, "16777216", 8);
    assert_int_equal(pwrite(file, text, (size_t)got, 0), got);
    assert_int_equal(pwrite(file, &nan, sizeof nan, (off_t)(header + (size_t)ROWS * IN * 8 - 8)), sizeof nan);
    close(file);
    fflush(stdout);
    pid_t child = start("%/tanh --inputs %/huge.npy --out %/no --memory 64M --threads 1");
    struct rusage usage;
    int status = 0;
    assert_int_equal(wait4(child, &status, 0, &usage), child);
    read_text(in_root("stderr"), complained);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 2);
    if (!strstr(complained, "huge.npy: row 16777215, number 3 is NaN"))
        fail_msg("%s", complained);
    /* A child's peak is at least that of the process that forks it, which is large under a sanitizer. */
    struct rusage own;
    assert_int_equal(getrusage(RUSAGE_SELF, &own), 0);
    if (usage.ru_maxrss > 64 << 10 && usage.ru_maxrss > own.ru_maxrss)
        fail_msg("%ld KiB at the peak", usage.ru_maxrss);
    /* The limit counts from the first byte: what it names does, whatever part of the job is the first that is refused. */
    for (int i = 0; i < 2; i++) {
        const char *more = i ? "--outputs label" : "";
        expect(0, "%%/tanh --inputs %%/x.npy --out %%/limit0 --threads 1 %s", more);
        for (int bytes = 100; bytes < 100000; bytes *= 3) {
            shell("rm -rf limit1");
            int refused = finish(start(
                (snprintf(text, sizeof text,
                          "%%/tanh --inputs %%/x.npy --out %%/limit1 --threads 1 --memory %d %s", bytes, more),
                 text)));
            if (!refused)
                continue;
            const char *least = strstr(complained, "the least that would do is ");
            assert_int_equal(refused, 2);
            if (!least)
                fail_msg("%s", complained);
            expect(0, "%%/tanh --inputs %%/x.npy --out %%/limit1 --threads 1 --memory %llu %s",
                   strtoull(least + 27, NULL, 10), more);
            check_all_same("limit0", "limit1");
        }
    }
}

#ifdef __linux__
/* Runs the program with a stop at every system call, and kills it at number last of them (0: never). Returns how many there
 * were; -1 where nobody may trace. */
static long kill_at(const char *line, long last)
{
    int status = 0;
    traced = 1;
    pid_t child = start(line);
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFSTOPPED(status))
        return -1;
    if (ptrace(PTRACE_SETOPTIONS, child, NULL, (void *)(PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL))) {
        kill(child, SIGKILL);
        wait_killed(child, &status);
        return -1;
    }
    long stops = 0, pass = 0;
    for (;;) {
        if (ptrace(PTRACE_SYSCALL, child, NULL, (void *)pass))
            break;
        assert_int_equal(waitpid(child, &status, 0), child);
        if (!WIFSTOPPED(status))
            return stops;
        const int number = WSTOPSIG(status);
        pass = number == (SIGTRAP | 0x80) || number == SIGTRAP ? 0 : number;
        if (number == (SIGTRAP | 0x80) && ++stops == last)
            break;
    }
    kill(child, SIGKILL);
    assert_int_equal(wait_killed(child, &status), child);
    return stops;
}

/* A kill before and after every system call of the last part of a job: DIR has the old decomposition or the new one, never
 * some files of each. */
static void test_kill_publishing(void **state)
{
    static const char *const lines[] = {"%/tanh --inputs %/x.npy --out %/killed --threads 1 --top 0",
                                        "%/relu --inputs %/x.npy --out %/killed --threads 1 --top 0"};
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    print_message("skipped: the sanitizers' runtime has system calls and a tracer of its own\n");
    skip();
#endif
    shell("rm -rf killed");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/killed0 --threads 1 --top 0");
    expect(0, "%%/relu --inputs %%/x.npy --out %%/killed1 --threads 1 --top 0");
    setenv("OMP_NUM_THREADS", "1", 1);
    assert_false(all_same("killed0", "killed1"));
    shell("cp -r killed0 killed");
    const long all = kill_at(lines[1], 0);
    if (all < 0) {
        print_message("skipped: this machine lets nobody trace a process\n");
        skip();
    }
    assert_true(all_same("killed", "killed1"));
    check_no_parts("killed");
    int outcomes[2] = {0, 0};
    const long first_stop = all > 400 ? all - 400 : 1;
    /* At entry or at exit, which is the same: each second stop, and the others where those left no links of one kind. */
    for (int odd = 0; odd < 2 && (!odd || !exists(in_root("left0")) || !exists(in_root("left1"))); odd++)
        for (long last = first_stop + odd; last <= all + 2; last += 2) {
            struct stat about;
            shell("rm -rf killed && cp -r killed0 killed");
            (void)kill_at(lines[1], last);
            const int published = all_same("killed", "killed1");
            if (!published && !all_same("killed", "killed0"))
                fail_msg("killed at stop %ld of %ld: some files of each", last, all);
            /* The first kills that leave links, to the old files and then to the new ones. */
            if (lstat(in_root("killed/closure.npy"), &about) == 0 && S_ISLNK(about.st_mode) &&
                !exists(in_root(published ? "left1" : "left0")))
                shell(published ? "cp -a killed left1" : "cp -a killed left0");
            outcomes[published]++;
        }
    assert_true(outcomes[0] > 5 && outcomes[1] > 5);
    /* While it tidies up after a kill: where that begins, and then each call of it. */
    for (int k = 0; k < 2; k++) {
        long begun = 0;
        assert_true(all_same(k ? "left1" : "left0", k ? "killed1" : "killed0"));
        for (long last = 1, step = 20; last < all && (!begun || last < begun + 60); last += step) {
            struct stat about;
            shell(k ? "rm -rf killed && cp -a left1 killed" : "rm -rf killed && cp -a left0 killed");
            (void)kill_at(lines[!k], last);
            if (!all_same("killed", k ? "killed1" : "killed0"))
                fail_msg("killed at stop %ld of %ld while tidying up: other files than before", last, all);
            const int links = lstat(in_root("killed/closure.npy"), &about) == 0 && S_ISLNK(about.st_mode) &&
                              exists(in_root("killed/.pathkernel/links"));
            if (!links && !begun) {
                begun = last;
                step = 2;
                last = last > 42 ? last - 42 : 1;
            }
        }
        assert_true(begun > 0);
        expect(0, "%%/%s --inputs %%/x.npy --out %%/killed --threads 1 --top 0", k ? "tanh" : "relu");
        check_all_same("killed", k ? "killed0" : "killed1");
        check_no_parts("killed");
    }
    /* Into a new folder: all of it or nothing. */
    outcomes[0] = outcomes[1] = 0;
    for (long last = first_stop; last <= all; last += 6) {
        shell("rm -rf killed");
        (void)kill_at(lines[1], last);
        int there = 0;
        for (int i = 0; i < 6; i++)
            there += exists(in_root("killed/%s.npy", all_names[i]));
        if (there != 0 && (there != 6 || !all_same("killed", "killed1")))
            fail_msg("killed at stop %ld of %ld: %d files of 6", last, all, there);
        outcomes[there != 0]++;
    }
    assert_true(outcomes[0] > 5 && outcomes[1] > 5);
    unsetenv("OMP_NUM_THREADS");
}
#endif

/* A second decomposition into the same folder takes the place of the first. */
static void test_again(void **state)
{
    (void)state;
    expect(0, "%%/tanh --inputs %%/200.npy --out %%/again --keep train --keep step");
    assert_null(strstr(told, "older decomposition"));
    expect(0, "%%/relu --inputs %%/x.npy --out %%/again --keep train");
    assert_non_null(strstr(told, "by_step.npy is of an older decomposition"));
    check_identity("again", M, OUT, "by_example", N);
    expect(0, "%%/relu --inputs %%/x.npy --out %%/anew");
    check_all_same("again", "anew");
}

/* ---- pathkernel train ---------------------------------------------------------------------------------- */

#define EXAMPLES " --inputs ^/tanh/train_inputs.npy --targets ^/tanh/train_targets.npy "
#define NETWORK " --network input~4;dense~6;tanh;dense~3 --loss softmax_cross_entropy "

/* Trains with some options, decomposes what comes out, and closes. */
static void test_train(void **state)
{
    static const struct {
        const char *options, *line; /* a line of run.txt */
        size_t steps, batch;        /* of the first step */
    } cases[] = {
        {NETWORK "--rate 0.5 --steps 12", "sgd", 12, N},
        {NETWORK "--rate 0.5 --epochs 4 --batch 16", "sgd", 12, 16}, /* 16, 16 and 8 */
        {NETWORK "--rate 0.02 --steps 9 --batch 7 --optimizer adamw~weight_decay=0.1 --clip 0.1",
         "weight_decay=0.1", 9, 7},
        {NETWORK "--rate cosine:0.3:0.01 --steps 12 --batch 7 --optimizer sgd~momentum=0.9 --keep-every 5",
         "keep_every", 12, 7},
        {NETWORK "--rate 0.1 --steps 5 --batch 100 --group 1,3~rate=0.5 --group 0~frozen", "0 frozen", 5, N},
        {" --network input~4;dense~5;relu;residual(dense~5;relu);dense~3 --loss mean_squared --rate 0.1 "
         "--steps 6 --seed 9",
         "residual", 6, N},
        {" --network input~2x2;flatten;dense~3;log_softmax --loss nll --rate 0.1 --steps 6 --float32", "nll", 6,
         N},
        {" --network input~4;dense~3 --rate 0.001 --steps 6 --batch 16 --optimizer "
         "rmsprop~momentum=0.5~maximize=1 "
         "--loss softmax_cross_entropy~weight=1,2,0.5~label_smoothing=0.1~ignore_index=2",
         "label_smoothing=0.1 ", 6, 16},
    };
    (void)state;
    const size_t images[3] = {N, 2, 2};
    pk_array flat;
    assert_int_equal(pk_array_map(&context, in_root("tanh/train_inputs.npy"), 0, &flat), PK_OK);
    assert_int_equal(pk_array_write(&context, in_root("images.npy"), flat.type, 3, images, flat.data), PK_OK);
    pk_array_release(&context, &flat);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pk_run run;
        pk_batch batch;
        char manifest[TEXT];
        shell("rm -rf trained decomposed");
        expect(0,
               i == 6 ? "@train %%/trained --inputs %%/images.npy --targets %%/tanh/train_targets.npy %s"
                      : "@train %%/trained" EXAMPLES "%s",
               cases[i].options);
        assert_string_equal(complained, "");
        assert_non_null(strstr(told, "loss "));
        if (pk_run_open(&context, in_root("trained"), &run) != PK_OK)
            fail_msg("%s", pk_message(&context));
        if (i == 7) { /* The mean by weights, and without the examples that are ignored. */
            char line[100];
            pk_real w[15], y[3];
            double sum = 0, weights = 0;
            size_t known = 0;
            assert_int_equal(pk_run_weights(&context, &run, run.steps, w), PK_OK);
            for (int64_t k = 0; k < N; k++) {
                pk_real x[4], f[3];
                double mean;
                pk_dataset_inputs(&run.train, &k, 1, x);
                assert_int_equal(pk_graph_evaluate(&context, &run.graph, w, pk_matrix_view(x, 1, 4),
                                                   pk_matrix_view(f, 1, 3)),
                                 PK_OK);
                pk_criterion_targets(&run.criterion, &run.train, &k, 1, 3, y);
                pk_criterion_mean(&run.criterion, &run.train, &k, 1, &mean);
                sum += pk_criterion_value(&run.criterion, 3, f, y);
                weights += isfinite(mean) ? 1 / mean : 0;
                known += isfinite(mean) != 0;
            }
            assert_true(known > 0 && known < N);
            snprintf(line, sizeof line, "             %.6g of all examples at the end", sum / weights);
            assert_non_null(strstr(told, line));
            snprintf(line, sizeof line, " of %zu classified correctly", known);
            assert_non_null(strstr(told, line));
            assert_non_null(strstr(told, "ignore_index=2"));
        }
        assert_int_equal(run.steps, cases[i].steps);
        assert_int_equal(run.examples, N);
        pk_run_batch(&run, 0, &batch);
        assert_int_equal(batch.count, cases[i].batch);
        read_text(in_root("trained/run.txt"), manifest);
        if (!strstr(manifest, cases[i].line))
            fail_msg("%s", manifest);
        pk_run_release(&context, &run);
        if (i == 6)
            expect(0, "@decompose %%/trained --inputs %%/images.npy --out %%/decomposed --top 0");
        else
            expect(0, "@decompose %%/trained --inputs %%/x.npy --out %%/decomposed --top 0");
        check_identity("decomposed", i == 6 ? N : M, OUT, "by_example", N);
    }
}

/* The weights of the library's own loop, and the same files for any number of threads. */
static void test_train_bits(void **state)
{
    pk_array weights;
    (void)state;
    assert_int_equal(pk_array_map(&context, in_root("relu/weights.npy"), 0, &weights), PK_OK);
    write_array("w0.npy", weights.type, 1, weights.shape[1], 0, weights.data);
    pk_array_release(&context, &weights);
    for (int threads = 1; threads <= 4; threads++) {
        shell("rm -rf trained");
        expect(0,
               "@train %%/trained" EXAMPLES
               "--network input~4;dense~6;relu;dense~5;relu;dense~3 --rate 0.2 --steps %d "
               "--loss softmax_cross_entropy --optimizer sgd~momentum=0.9~weight_decay=0.01 --batch 16 --init "
               "%%/w0.npy "
               "--threads %d",
               S, threads);
        shell("diff -r trained relu");
    }
    /* The seed is that of the initial weights and of the batches. */
    pk_graph graph;
    pk_run run;
    pk_real first[100], expected[100];
    memset(&graph, 0, sizeof graph);
    shell("rm -rf trained seeded");
    expect(0, "@train %%/trained" EXAMPLES NETWORK "--rate 0.2 --steps 3 --batch 16 --seed 11");
    expect(0, "@train %%/seeded" EXAMPLES NETWORK "--rate 0.2 --steps 3 --batch 16 --seed 12");
    assert_int_equal(pk_network_parse(&context, "input 4; dense 6; tanh; dense 3", &graph), PK_OK);
    assert_int_equal(pk_network_initialize(&context, &graph, 11, expected), PK_OK);
    assert_int_equal(pk_run_open(&context, in_root("trained"), &run), PK_OK);
    assert_int_equal(pk_run_weights(&context, &run, 0, first), PK_OK);
    assert_memory_equal(first, expected, graph.parameters * sizeof *first);
    pk_run_release(&context, &run);
    pk_graph_release(&context, &graph);
    shell("! cmp -s trained/weights.npy seeded/weights.npy && ! cmp -s trained/batch_items.npy "
          "seeded/batch_items.npy");
    /* Without a seed of its own the order of the rows stays that of the file. */
    shell("rm -rf trained");
    expect(0, "@train %%/trained" EXAMPLES NETWORK "--rate 0.2 --epochs 1 --batch 16 --in-order");
    assert_int_equal(pk_run_open(&context, in_root("trained"), &run), PK_OK);
    assert_int_equal(run.steps, 3);
    for (int i = 0; i < N; i++)
        assert_int_equal(run.batch_items[i], i);
    assert_int_equal(run.batch_offsets[3], N);
    pk_run_release(&context, &run);
}

/* The rates of each form of --rate, against their formula. */
static void test_train_rates(void **state)
{
    enum { STEPS = 10 };
    static const char *const forms[] = {"0.25",
                                        "cosine:0.5:0.1",
                                        "cosine:0.5:0:4",
                                        "step:0.5:0.1:3",
                                        "triangular:0.1:0.5:2",
                                        "triangular:0.1:0.5:2:4",
                                        "warmup:4:0.3",
                                        "warmup:4:step:0.5:0.5:5",
                                        "%/rates.npy",
                                        "warmup:2:%/rates.npy"};
    const double pi = 3.14159265358979323846;
    double rates[STEPS];
    (void)state;
    for (int s = 0; s < STEPS; s++)
        rates[s] = 0.1 + 0.01 * s * s;
    write_array("rates.npy", PK_FLOAT64, 1, STEPS, 0, rates);
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        pk_array array;
        shell("rm -rf trained");
        char rate[100], line[1000];
        snprintf(rate, sizeof rate, "%s", forms[i]);
        snprintf(line, sizeof line, "@train %%/trained" EXAMPLES NETWORK "--steps %d --rate %s", STEPS, rate);
        if (finish(start(line)) != 0)
            fail_msg("%s: %s", line, complained);
        assert_int_equal(pk_array_map(&context, in_root("trained/learning_rates.npy"), 0, &array), PK_OK);
        assert_true(array.type == PK_FLOAT64 && array.shape[0] == STEPS);
        for (int s = 0; s < STEPS; s++) {
            const double warm = 1. / 3 + 2. / 3 * (s < 4 ? s : 4) / 4;
            const double expected[] = {
                0.25,
                0.1 + 0.4 * (1 + cos(pi * s / STEPS)) / 2,
                0.5 * (1 + cos(pi * s / 4)) / 2,
                0.5 * pow(0.1, s / 3),
                s % 4 < 2 ? 0.1 + 0.2 * (s % 4) : 0.5 - 0.2 * (s % 4 - 2),
                s % 6 < 2 ? 0.1 + 0.2 * (s % 6) : 0.5 - 0.1 * (s % 6 - 2),
                0.3 * warm,
                warm * 0.5 * pow(0.5, s / 5),
                rates[s],
                (s < 2 ? 1. / 3 + 2. / 3 * s / 2 : 1) * rates[s],
            };
            const double rate_there = ((const double *)array.data)[s];
            if (!(fabs(rate_there - expected[i]) <= 1e-15))
                fail_msg("%s, step %d: %.17g, not %.17g", forms[i], s, rate_there, expected[i]);
        }
        pk_array_release(&context, &array);
    }
}

/* Each option with what it cannot be; nothing is left of the run. */
static void test_train_refuses(void **state)
{
#define TRAIN "@train %/no" EXAMPLES NETWORK "--rate 0.1 --steps 3"
    static const struct {
        const char *arguments, *words;
    } cases[] = {
        {"@train", "no folder for the run is given"},
        {"@train %/no", "--inputs X.npy is missing"},
        {"@train %/no --inputs %/x.npy", "--targets Y.npy is missing"},
        {"@train %/no" EXAMPLES, "--network LINE is missing"},
        {"@train %/no" EXAMPLES "--network input~4;dense~3", "--loss TEXT is missing"},
        {"@train %/no" EXAMPLES NETWORK, "--rate SCHEDULE is missing"},
        {"@train %/no" EXAMPLES NETWORK "--rate 0.1", "--steps S or --epochs E is missing"},
        {TRAIN " --epochs 3", "--steps and --epochs are both given"},
        {TRAIN " %/other", "only one folder for the run is taken"},
        {TRAIN " --learning-rate 3", "unknown option '--learning-rate'"},
        {TRAIN " --stesp 3", "unknown option '--stesp' (is it --steps?)"},
        {TRAIN " --optimiser sgd", "unknown option '--optimiser' (is it --optimizer?)"},
        {TRAIN " --inputs %/gone.npy", "--inputs: "},
        {TRAIN " --inputs %/tanh", "is a directory"},
        {TRAIN " --inputs %/200.npy", "not one target row for each input row"},
        {TRAIN " --inputs", "--inputs needs a value"},
        {TRAIN " --inputs %/bad-wide.npy", "rows of 5 numbers; the network takes 4"},
        {TRAIN " --inputs %/bad-nan.npy", "row 3, number 1 is not finite"},
        {TRAIN " --targets %/gone.npy", "--targets: "},
        {TRAIN " --targets %/bad-high.npy", "row 7: label 3 is not in [0, 3)"},
        {TRAIN " --targets %/bad-nan.npy", "--targets"},
        {TRAIN " --targets %/bad-few.npy", "not one target row for each input row"},
        {TRAIN " --network dense~3", "a network starts with 'input'"},
        {TRAIN " --network input~4;dens~3", "'dens' is not a layer that is known (is it 'dense'?)"},
        {TRAIN " --network input~4;tanh", "it has no weights, so nothing can be trained"},
        {TRAIN " --network input~4;dense~2", "label 2 is not in [0, 2)"},
        {TRAIN " --network input~4;dense~3;propagate~A", "--network: "},
        {TRAIN " --loss hing", "--loss: 'hing' is not a loss; these are: squared"},
        {TRAIN " --loss hinge --network input~4;dense~1", "--targets: "},
        {TRAIN " --optimizer lion", "'lion' is not sgd, adam, adamw, rmsprop, adagrad or nadam"},
        {TRAIN " --loss huber~delta=0", "--loss: loss huber: delta is 0"},
        {TRAIN " --loss softmax_cross_entropy~weight=1,2", "--targets: "},
        {TRAIN " --loss nll~label_smoothing=0.1", "--loss: "},
        {TRAIN " --optimizer adam~beta3=0.9", "is not one of its keys: beta1, beta2, epsilon, weight_decay"},
        {TRAIN " --optimizer sgd~momentum=2e400", "--optimizer: "},
        {TRAIN " --optimizer sgd~nesterov=1", "nesterov needs momentum > 0"},
        {TRAIN " --rate fast", "'fast' is not a schedule; these are: R, cosine:R0:R1[:PERIOD], step:"},
        {TRAIN " --rate -1", "--rate: '-1' is not a schedule"},
        {TRAIN " --rate nan", "'nan' is not a schedule"},
        {TRAIN " --rate 1e999", "'1e999' is not a schedule"},
        {TRAIN " --rate 0x1p3", "'0x1p3' is not a schedule"},
        {TRAIN " --rate 0.1x", "'0.1x' is not a schedule"},
        {TRAIN " --rate 0.1:2", "'0.1:2' is not a schedule"},
        {TRAIN " --rate cosine", "'cosine' is not a schedule"},
        {TRAIN " --rate cosine:0.1", "'cosine:0.1' is not a schedule"},
        {TRAIN " --rate cosine:0.1:0:0", "'cosine:0.1:0:0' is not a schedule"},
        {TRAIN " --rate step:0.1:0.5:1.5", "'step:0.1:0.5:1.5' is not a schedule"},
        {TRAIN " --rate step:0.1:0:3", "'step:0.1:0:3' is not a schedule"},
        {TRAIN " --rate step:0.1:0.5:3:4", "'step:0.1:0.5:3:4' is not a schedule"},
        {TRAIN " --rate triangular:0.1:0.5", "'triangular:0.1:0.5' is not a schedule"},
        {TRAIN " --rate warmup:3", "'warmup:3' is not a schedule"},
        {TRAIN " --rate warmup:3:", "'warmup:3:' is not a schedule"},
        {TRAIN " --rate warmup:0:0.1", "'warmup:0:0.1' is not a schedule"},
        {TRAIN " --rate %/gone.npy", "--rate: "},
        {TRAIN " --rate %/bad-rates.npy", "3 steps need (3,) of float64"},
        {TRAIN " --rate %/bad-rates32.npy", "type float32; 3 steps need (3,) of float64"},
        {TRAIN " --rate %/bad-minus.npy", "--rate: "},
        {TRAIN " --steps 0", "--steps: '0' is not a whole number"},
        {TRAIN " --steps 1.5", "--steps: '1.5' is not"},
        {TRAIN " --steps -3", "--steps: '-3' is not"},
        {"@train %/no" EXAMPLES NETWORK "--rate 0.1 --epochs 0", "--epochs: '0' is not"},
        {"@train %/no" EXAMPLES NETWORK "--rate 0.1 --batch 1 --epochs 18446744073709551615", "--epochs: "},
        {TRAIN " --batch 0", "--batch: '0' is not"},
        {TRAIN " --batch all", "--batch: 'all' is not"},
        {TRAIN " --seed -1", "--seed: '-1' is not"},
        {TRAIN " --seed 99999999999999999999999", "--seed: '9999"},
        {TRAIN " --init %/gone.npy", "--init: "},
        {TRAIN " --init %/x.npy", "x.npy has shape (23, 4); the network has 51 parameters, (51,)"},
        {TRAIN " --init %/bad-init.npy", "--init: "},
        {TRAIN " --clip 0", "--clip: '0' is not a positive number"},
        {TRAIN " --clip inf", "--clip: 'inf' is not"},
        {TRAIN " --group 9~frozen", "--group: "},
        {TRAIN " --group 1~speed=3", "--group: "},
        {TRAIN " --group 1~frozen --group 1~rate=0.5", "--group: "},
        {TRAIN " --constant A", "--constant: 'A' is not NAME=FILE.npy"},
        {TRAIN " --constant =A.npy", "--constant: '=A.npy' is not"},
        {TRAIN " --network input~4;dense~3;batch_norm~A --constant A=%/gone.npy", "--network: "},
        {TRAIN " --keep-every 0", "--keep-every: '0' is not"},
        {TRAIN " --keep-every 9999999999", "--keep-every: 9999999999 is more than"},
        {TRAIN " --threads 0", "--threads: '0' is not"},
        {TRAIN " --memory much", "--memory: 'much' is not a size"},
        {TRAIN " --memory 1K", "--memory: "},
        {TRAIN " --resume=1", "--resume takes no value"},
        {"@train %/gone/no" EXAMPLES NETWORK "--rate 0.1 --steps 3", "/gone/no: "},
        {"@train %/tanh" EXAMPLES NETWORK "--rate 0.1 --steps 3", "/tanh is there already"},
        {"@train %/x.npy" EXAMPLES NETWORK "--rate 0.1 --steps 3", "/x.npy is there already"},
        {"@train %/bad-empty" EXAMPLES NETWORK "--rate 0.1 --steps 3", "/bad-empty is there already"},
    };
#undef TRAIN
    double numbers_there[N * 5];
    int64_t labels[N] = {0};
    (void)state;
    for (int i = 0; i < N * 5; i++)
        numbers_there[i] = i;
    write_array("bad-wide.npy", PK_FLOAT64, 2, N, 5, numbers_there);
    write_array("bad-rates.npy", PK_FLOAT64, 1, 4, 0, numbers_there);
    write_array("bad-rates32.npy", PK_FLOAT32, 1, 3, 0, numbers_there);
    numbers_there[1] = -1;
    write_array("bad-minus.npy", PK_FLOAT64, 1, 3, 0, numbers_there);
    numbers_there[3 * IN + 1] = NAN;
    write_array("bad-nan.npy", PK_FLOAT64, 2, N, IN, numbers_there);
    write_array("bad-init.npy", PK_FLOAT64, 1, 51, 0, numbers_there);
    write_array("bad-few.npy", PK_INT64, 1, N - 1, 0, labels);
    labels[7] = OUT;
    write_array("bad-high.npy", PK_INT64, 1, N, 0, labels);
    shell("mkdir -p bad-empty");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_refused(cases[i].arguments, cases[i].words);
        if (exists(in_root("no")))
            fail_msg("%s leaves a folder", cases[i].arguments);
    }
}

/* Interrupted and resumed training gives the files of the whole. */
static void test_train_resumes(void **state)
{
#define MOMENTUM EXAMPLES NETWORK "--rate 0.1 --batch 16 --optimizer sgd~momentum=0.9 "
    (void)state;
    shell("rm -rf trained whole-run");
    expect(0, "@train %%/whole-run" MOMENTUM "--steps 25");
    expect(0, "@train %%/trained" MOMENTUM "--steps 10 --resume"); /* there is none yet */
    expect(0, "@train %%/trained" MOMENTUM "--steps 25 --resume");
    assert_non_null(strstr(told, "resumed after step 10"));
    shell("cmp trained/weights.npy whole-run/weights.npy && cmp trained/batch_items.npy "
          "whole-run/batch_items.npy");
    expect(0, "@train %%/trained" MOMENTUM "--steps 25 --resume"); /* there is nothing left to do */
    shell("cmp trained/weights.npy whole-run/weights.npy");
    static const struct {
        const char *arguments, *words;
    } cases[] = {
        {"@train %/trained" MOMENTUM "--steps 20 --resume", "holds 25 steps already"},
        {"@train %/trained" MOMENTUM "--steps 30 --resume --seed 2", "trained"},
        {"@train %/trained" MOMENTUM "--steps 30 --resume --optimizer sgd", "optimizer"},
        {"@train %/trained" MOMENTUM "--steps 30 --resume --rate 0.2", "the rate of its step 0 is"},
        {"@train %/trained" MOMENTUM "--steps 30 --resume --batch 8", "its step 0 used another batch"},
        {"@train %/trained" MOMENTUM "--steps 30", "is there already"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_refused(cases[i].arguments, cases[i].words);
        shell("cmp trained/weights.npy whole-run/weights.npy");
    }
    /* Ctrl-C. */
    shell("rm -rf trained whole-run; : >stderr");
    pid_t child =
        start("@train %/trained" MOMENTUM "--steps 100000000 --keep-every 1000 --threads 1 --verbose");
    wait_for("training, after");
    usleep(20000);
    kill(child, SIGINT);
    assert_int_equal(finish(child), 2);
    assert_string_equal(told, "");
    const char *cancelled = strstr(complained, "cancelled: ");
    assert_non_null(cancelled);
    unsigned long steps = strtoul(cancelled + 11, NULL, 10) + 5;
    expect(0, "@train %%/trained" MOMENTUM "--steps %lu --keep-every 1000 --resume", steps);
    expect(0, "@train %%/whole-run" MOMENTUM "--steps %lu --keep-every 1000", steps);
    shell("diff -r trained whole-run");
#undef MOMENTUM
}

/* The step at which training diverges is named, and those before it are a run. */
static void test_train_diverges(void **state)
{
    pk_run run;
    (void)state;
    shell("rm -rf trained");
    expect_refused("@train %/trained" EXAMPLES
                   "--network input~4;dense~6;relu;dense~6;relu;dense~3 --loss squared --rate 50 "
                   "--steps 3000",
                   "training diverged, step ");
    const unsigned long step = strtoul(strstr(complained, "diverged, step ") + 15, NULL, 10);
    assert_int_equal(pk_run_open(&context, in_root("trained"), &run), PK_OK);
    assert_true(step > 0 && run.steps == step);
    pk_run_release(&context, &run);
    /* At once: nothing is recorded. */
    double large[51];
    for (int i = 0; i < 51; i++)
        large[i] = EITHER(1e200, 1e30);
    write_array("large.npy", PK_FLOAT64, 1, 51, 0, large);
    expect_refused("@train %/no" EXAMPLES
                   "--network input~4;dense~6;relu;dense~3 --loss squared --rate 1 --steps 3 "
                   "--init %/large.npy",
                   "training diverged, step 0");
    assert_false(exists(in_root("no")));
}

/* ---- pathkernel kernel --------------------------------------------------------------------------------- */

/* Runs `pathkernel kernel` with some options, and compares what it writes with what the library gives for others, bit by
 * bit. left, right: names of files, or NULL, the training rows; labels: those of classes.npy. */
static void check_kernel(const char *run_name, const char *line, const char *left, const char *right,
                         int labels, const pk_kernel_options *options, int rank, const size_t *expected)
{
    pk_dataset sides[2];
    const char *const names[2] = {left, right};
    pk_run run;
    size_t shape[6], count = 1;
    int dimensions;
    char words[1200];
    memset(sides, 0, sizeof sides);
    shell("rm -f K.npy");
    snprintf(words, sizeof words, "@kernel %%/%s --out %%/K.npy %s", run_name, line);
    if (finish(start(words)) != 0)
        fail_msg("%s: %s", words, complained);
    assert_string_equal(complained, "");
    if (pk_run_open(&context, in_root("%s", run_name), &run) != PK_OK)
        fail_msg("%s", pk_message(&context));
    for (int i = 0; i < 2; i++) {
        if (names[i])
            assert_int_equal(pk_array_map(&context, in_root("%s", names[i]), 0, &sides[i].inputs), PK_OK);
        if (names[i] && labels)
            assert_int_equal(pk_array_map(&context, in_root("classes.npy"), 0, &sides[i].targets), PK_OK);
    }
    const int same = left == right || (left && right && strcmp(left, right) == 0);
    const pk_dataset *l = left ? &sides[0] : NULL, *r = same ? l : right ? &sides[1] : NULL;
    if (pk_kernel_shape(&context, &run, l, r, options, shape, &dimensions) != PK_OK)
        fail_msg("%s", pk_message(&context));
    assert_int_equal(dimensions, rank);
    for (int i = 0; i < rank; i++) {
        assert_int_equal(shape[i], expected[i]);
        count *= shape[i];
    }
    double *gram = (double *)calloc(count, sizeof *gram);
    assert_non_null(gram);
    if (pk_kernels(&context, &run, l, r, 1, options, &gram, NULL) != PK_OK)
        fail_msg("%s: %s", line, pk_message(&context));
    pk_array made;
    assert_int_equal(pk_array_map(&context, in_root("K.npy"), 0, &made), PK_OK);
    assert_int_equal(made.type, PK_FLOAT64);
    assert_int_equal(made.rank, rank);
    for (int i = 0; i < rank; i++)
        assert_int_equal(made.shape[i], expected[i]);
    if (memcmp(made.data, gram, count * sizeof *gram) != 0)
        fail_msg("%s: other numbers than the library's", line);
    pk_array_release(&context, &made);
    free(gram);
    for (int i = 0; i < 2; i++) {
        pk_array_release(&context, &sides[i].inputs);
        pk_array_release(&context, &sides[i].targets);
    }
    pk_run_release(&context, &run);
}

/* Each flag, and each default. */
static void test_kernel(void **state)
{
    static const size_t at[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, three[] = {7, 2, 2};
    static const struct {
        const char *line, *left, *right;
        int labels, rank;
        size_t shape[5];
        pk_kernel_options means;
    } cases[] = {
        /* Defaults: the training rows, the trace, the last weights, all steps; auto; weighted by the batch. */
        {"--kernel ntk", NULL, NULL, 0, 2, {N, N}, {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE}},
        {"--kernel ntk --left train --right train --steps final --outputs trace --map none",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE, .steps = at + S, .step_count = 1}},
        {"--kernel path_average",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_PATH_AVERAGE, .outputs = PK_OUTPUTS_TRACE, .steps = at, .step_count = S + 1}},
        {"--kernel path",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_PATH, .outputs = PK_OUTPUTS_TRACE, .steps = at, .step_count = S}},
        {"--kernel epk --batch weight --rule auto --steps all",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_EPK, .outputs = PK_OUTPUTS_TRACE}},
        {"--kernel conjugate", NULL, NULL, 0, 2, {N, N}, {.kind = PK_KERNEL_CONJUGATE}},
        {"--kernel embedding", NULL, NULL, 0, 2, {N, N}, {.kind = PK_KERNEL_EMBEDDING}},
        {"--kernel loss_path", NULL, NULL, 0, 2, {N, N}, {.kind = PK_KERNEL_LOSS_PATH}},
        {"--kernel tracin --rule left", NULL, NULL, 0, 2, {N, N}, {.kind = PK_KERNEL_TRACIN}},
        /* Sides. */
        {"--kernel ntk --left %/x.npy --rule auto",
         "x.npy",
         "x.npy",
         0,
         2,
         {M, M},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE}},
        {"--kernel ntk --left %/x.npy --right train",
         "x.npy",
         NULL,
         0,
         2,
         {M, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE}},
        {"--kernel epk --right %/x.npy",
         NULL,
         "x.npy",
         0,
         2,
         {N, M},
         {.kind = PK_KERNEL_EPK, .outputs = PK_OUTPUTS_TRACE}},
        {"--kernel epk --left %/x.npy --right %/200.npy --threads 3",
         "x.npy",
         "200.npy",
         0,
         2,
         {M, 200},
         {.kind = PK_KERNEL_EPK, .outputs = PK_OUTPUTS_TRACE}},
        {"--kernel loss_path --left %/x.npy --left-labels %/classes.npy",
         "x.npy",
         "x.npy",
         1,
         2,
         {M, M},
         {.kind = PK_KERNEL_LOSS_PATH}},
        {"--kernel tracin --left %/x.npy --left-labels %/classes.npy --right train",
         "x.npy",
         NULL,
         1,
         2,
         {M, N},
         {.kind = PK_KERNEL_TRACIN}},
        {"--kernel loss_path --right %/x.npy --right-labels %/classes.npy",
         NULL,
         "x.npy",
         1,
         2,
         {N, M},
         {.kind = PK_KERNEL_LOSS_PATH}},
        /* Outputs. */
        {"--kernel ntk --outputs full --left %/x.npy --right train",
         "x.npy",
         NULL,
         0,
         4,
         {M, OUT, N, OUT},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_FULL}},
        {"--kernel ntk --outputs mean",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_MEAN}},
        {"--kernel ntk --outputs sum",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_SUM}},
        {"--kernel ntk --outputs 2",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_ONE, .output = 2}},
        {"--kernel ntk --outputs label",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_LABEL}},
        {"--kernel ntk --outputs label --left %/x.npy --left-labels %/classes.npy --right train",
         "x.npy",
         NULL,
         1,
         2,
         {M, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_LABEL}},
        /* Steps. */
        {"--kernel ntk --steps initial",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE, .steps = at, .step_count = 1}},
        {"--kernel ntk --steps all --left %/x.npy",
         "x.npy",
         "x.npy",
         0,
         3,
         {S + 1, M, M},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE, .steps = at, .step_count = S + 1}},
        {"--kernel ntk --steps 7,2,2 --by-layer",
         NULL,
         NULL,
         0,
         4,
         {3, 2, N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE, .steps = three, .step_count = 3, .by_layer = 1}},
        {"--kernel path --steps initial",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_PATH, .outputs = PK_OUTPUTS_TRACE, .steps = at, .step_count = 1}},
        {"--kernel path --steps final",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_PATH, .outputs = PK_OUTPUTS_TRACE, .steps = at + S - 1, .step_count = 1}},
        /* Rules, weights, maps. */
        {"--kernel path --rule left",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_PATH, .outputs = PK_OUTPUTS_TRACE, .quadrature = {PK_RULE_LEFT, 0}}},
        {"--kernel path --rule trapezoid",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_PATH, .outputs = PK_OUTPUTS_TRACE, .quadrature = {PK_RULE_TRAPEZOID, 2}}},
        {"--kernel epk --rule gauss:3 --left %/x.npy",
         "x.npy",
         "x.npy",
         0,
         2,
         {M, M},
         {.kind = PK_KERNEL_EPK, .outputs = PK_OUTPUTS_TRACE, .quadrature = {PK_RULE_GAUSS, 3}}},
        {"--kernel epk --batch none",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_EPK, .outputs = PK_OUTPUTS_TRACE, .unweighted = 1}},
        {"--kernel conjugate --append-one",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_CONJUGATE, .append_one = 1}},
        {"--kernel ntk --map cosine --left %/x.npy --right train",
         "x.npy",
         NULL,
         0,
         2,
         {M, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE, .map = PK_MAP_COSINE}},
        {"--kernel ntk --map center",
         NULL,
         NULL,
         0,
         2,
         {N, N},
         {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE, .map = PK_MAP_CENTER}},
        {"--kernel epk --by-layer --left %/x.npy --right train",
         "x.npy",
         NULL,
         0,
         3,
         {2, M, N},
         {.kind = PK_KERNEL_EPK, .outputs = PK_OUTPUTS_TRACE, .by_layer = 1}},
    };
    int64_t classes[M];
    (void)state;
    for (int i = 0; i < M; i++)
        classes[i] = i % OUT;
    write_array("classes.npy", PK_INT64, 1, M, 0, classes);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_kernel("tanh", cases[i].line, cases[i].left, cases[i].right, cases[i].labels, &cases[i].means,
                     cases[i].rank, cases[i].shape);
}

/* Python's numbers for each text of --steps: the matrix of each, in that order. */
static void test_kernel_steps(void **state)
{
    static const struct {
        const char *text;
        size_t count, steps[S + 1];
    } cases[] = {{"0:13:4", 4, {0, 4, 8, 12}},
                 {"0:12:4", 3, {0, 4, 8}},
                 {"3:20:9", 2, {3, 12}},
                 {"5:6:1", 1, {5}},
                 {"2:5", 3, {2, 3, 4}},
                 {":3", 3, {0, 1, 2}},
                 {"10:", 3, {10, 11, 12}},
                 {"::6", 3, {0, 6, 12}},
                 {"11", 1, {11}},
                 {"12,0", 2, {12, 0}},
                 {"initial", 1, {0}},
                 {"final", 1, {12}}};
    pk_array all;
    (void)state;
    expect(0, "@kernel %%/tanh --kernel ntk --steps all --out %%/all.npy --left %%/x.npy");
    assert_int_equal(pk_array_map(&context, in_root("all.npy"), 0, &all), PK_OK);
    assert_int_equal(all.shape[0], S + 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pk_array some;
        expect(0, "@kernel %%/tanh --kernel ntk --steps %s --out %%/some.npy --left %%/x.npy", cases[i].text);
        assert_int_equal(pk_array_map(&context, in_root("some.npy"), 0, &some), PK_OK);
        assert_int_equal(some.rank, cases[i].count > 1 ? 3 : 2);
        assert_int_equal(pk_array_items(&some), cases[i].count * M * M);
        for (size_t k = 0; k < cases[i].count; k++)
            assert_memory_equal(numbers(&some) + k * M * M, numbers(&all) + cases[i].steps[k] * M * M,
                                M * M * sizeof(double));
        pk_array_release(&context, &some);
    }
    pk_array_release(&context, &all);
}

static void test_kernel_refuses(void **state)
{
#define KERNEL "@kernel %/tanh --out %/no.npy --kernel "
    static const struct {
        const char *arguments, *words;
    } cases[] = {
        {"@kernel", "no run directory is given"},
        {"@kernel %/tanh", "--kernel NAME is missing"},
        {"@kernel %/tanh --kernel ntk", "--out K.npy is missing"},
        {"@kernel %/gone --kernel ntk --out %/no.npy", "/gone/run.txt: No such file"},
        {KERNEL "nkt", "'nkt' is not a kernel; known are: ntk, conjugate"},
        {KERNEL "ntk --left %/gone.npy", "--left: "},
        {KERNEL "ntk --left %/bad-wide.npy", "--left: "},
        {KERNEL "ntk --left %/bad-nan.npy", "not finite"},
        {KERNEL "ntk --right %/gone.npy", "--right: "},
        {KERNEL "ntk --left-labels %/classes.npy", "the training rows have labels of their own"},
        {KERNEL "ntk --left %/x.npy --right-labels %/classes.npy", "--right-labels: without --right"},
        {KERNEL "ntk --left %/x.npy --outputs label", "labels"},
        {KERNEL "ntk --left %/x.npy --outputs label --left-labels %/bad-few.npy", "--left-labels: "},
        {KERNEL "ntk --left %/x.npy --outputs label --left-labels %/gone.npy", "--left-labels: "},
        {KERNEL "ntk --left %/x.npy --outputs label --left-labels %/high-classes.npy", "label"},
        {KERNEL "ntk --left %/x.npy --outputs label --left-labels %/x.npy", "label"},
        {KERNEL "loss_path --left %/x.npy", "targets"},
        {KERNEL "tracin --left %/x.npy --right train", "targets"},
        {KERNEL "ntk --outputs all",
         "'all' is not an output mode or the number of an output, counted from 0; known are: full"},
        {KERNEL "ntk --outputs 3", "output 3"},
        {KERNEL "ntk --outputs -1", "'-1' is not an output mode"},
        {KERNEL "conjugate --outputs trace", "--outputs: the kernel conjugate has none"},
        {KERNEL "embedding --outputs full", "--outputs: the kernel embedding has none"},
        {KERNEL "loss_path --outputs 0", "--outputs: the kernel loss_path has none"},
        {KERNEL "tracin --outputs sum", "--outputs: the kernel tracin has none"},
        {KERNEL "ntk --steps 13", "--steps: '13' has 13; the run has the weights 0 to 12"},
        {KERNEL "ntk --steps 0,13", "the run has the weights 0 to 12"},
        {KERNEL "ntk --steps -1", "--steps: '-1' is not"},
        {KERNEL "ntk --steps 3:14:10", "has 13; the run has the weights 0 to 12"},
        {KERNEL "ntk --steps 0:20:1", "'0:20:1' has 19; the run has the weights 0 to 12"},
        {KERNEL "ntk --steps 5:5:1", "--steps: '5:5:1' is not"},
        {KERNEL "ntk --steps 0:5:0", "--steps: '0:5:0' is not"},
        {KERNEL "ntk --steps 0:5:-1", "--steps: '0:5:-1' is not"},
        {KERNEL "ntk --steps 1:2:3:4", "--steps: '1:2:3:4' is not"},
        {KERNEL "ntk --steps 1,", "--steps: '1,' is not"},
        {KERNEL "ntk --steps last", "--steps: 'last' is not"},
        {KERNEL "ntk --steps 99999999999999999999", "--steps: '9999"},
        {KERNEL "path --steps 12", "the run has the steps 0 to 11"},
        {KERNEL "tracin --steps 0:13:12", "the run has the steps 0 to 11"},
        {KERNEL "path --rule simpson", "'simpson' is not a rule; these are: auto"},
        {KERNEL "path --rule gauss", "'gauss' is not a rule"},
        {KERNEL "path --rule exact", "rule"},
        {KERNEL "tracin --rule auto", "it has no rule but left"},
        {KERNEL "tracin --rule gauss:2", "it has no rule but left"},
        {KERNEL "ntk --rule trapezoid", "it has no rule but left"},
        {KERNEL "ntk --batch none", "--batch: the kernel ntk has no weights of batches"},
        {KERNEL "path --batch weight", "--batch: the kernel path has no weights of batches"},
        {KERNEL "epk --batch mean", "--batch: 'mean' is not weight or none"},
        {KERNEL "ntk --append-one", "--append-one: "},
        {KERNEL "ntk --map cos", "'cos' is not a map; known are: none, cosine, center"},
        {KERNEL "ntk --map center --right %/x.npy", "same rows"},
        {KERNEL "ntk --map cosine --outputs full", "map"},
        {KERNEL "ntk --tolerance 0", "--tolerance: '0' is not a positive"},
        {KERNEL "ntk --threads 0", "--threads: '0' is not"},
        {KERNEL "ntk --memory 1K", "--memory: "},
        {KERNEL "ntk --by-layers", "unknown option '--by-layers' (is it --by-layer?)"},
        {"@kernel %/tanh --kernel ntk --out %/gone/no.npy", "no.npy: "},
        {"@kernel %/tanh --kernel ntk --left %/x.npy --out %/x.npy", "x.npy is read; it would be overwritten"},
        {"@kernel %/still --kernel path --steps final --out %/no.npy", "--steps: the run has no steps"},
    };
#undef KERNEL
    int64_t classes[M] = {0};
    double wide[M * 5] = {0};
    classes[4] = OUT;
    (void)state;
    write_array("high-classes.npy", PK_INT64, 1, M, 0, classes);
    write_array("bad-few.npy", PK_INT64, 1, M - 1, 0, classes);
    write_array("bad-wide.npy", PK_FLOAT64, 2, M, 5, wide);
    wide[3 * IN + 1] = NAN;
    write_array("bad-nan.npy", PK_FLOAT64, 2, M, IN, wide);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_refused(cases[i].arguments, cases[i].words);
        if (exists(in_root("no.npy")) || exists(in_root("no.npy.part")))
            fail_msg("%s leaves a file", cases[i].arguments);
    }
}

/* ---- pathkernel compare -------------------------------------------------------------------------------- */

/* The table: rules in their order, what they leave, and the picture where gnuplot is. */
static void test_compare(void **state)
{
    static const char *const rules[] = {"left",        "segment",     "path_integral", "trapezoid",
                                        "midpoint",    "checkpoints", "linear_start",  "linear_end",
                                        "telescoping", "exact"};
    char text[TEXT];
    pk_array closure;
    double residual[10], median[10];
    (void)state;
    expect(0, "@compare %%/tanh --inputs %%/x.npy --out %%/compared");
    assert_string_equal(complained, "");
    read_text(in_root("compared/compare.csv"), text);
    char *line = strtok(text, "\n");
    assert_string_equal(line, "rule,residual_max,residual_median,spearman,seconds");
    for (int i = 0; i < 10; i++) {
        char name[40], end;
        double rank = NAN, seconds = -1;
        line = strtok(NULL, "\n");
        assert_non_null(line);
        assert_non_null(strstr(told, rules[i]));
        assert_int_equal(sscanf(line, "%39[^,],%lf,%lf%c", name, &residual[i], &median[i], &end), 4);
        assert_string_equal(name, rules[i]);
        assert_true(end == ',' && median[i] >= 0 && median[i] <= residual[i]);
        const char *last = strrchr(line, ','), *third = last - 1;
        assert_int_equal(sscanf(last, ",%lf", &seconds), 1);
        assert_true(seconds >= 0);
        while (*third != ',')
            third--;
        assert_int_equal(sscanf(third, ",%lf,", &rank), i != 8); /* telescoping has none */
        if (i != 8)
            assert_true(rank >= -1 && rank <= 1 + 1e-12);
        else
            assert_int_equal(third + 1, last);
        if (i == 9)
            assert_true(fabs(rank - 1) < 1e-12 && residual[9] < EITHER(1e-11, 1e-3));
    }
    assert_null(strtok(NULL, "\n"));
    assert_true(residual[0] > 10 * residual[9] && fabs(residual[0] - residual[8]) < EITHER(1e-12, 1e-3));
    /* What the left rule leaves is the closure of a decomposition by it. */
    expect(1, "@decompose %%/tanh --inputs %%/x.npy --out %%/by-left --quadrature left --top 0");
    closure = result(in_root("by-left/closure.npy"), M, OUT, 0, 0);
    double largest = 0;
    for (size_t i = 0; i < M * OUT; i++)
        largest = fmax(largest, fabs(numbers(&closure)[i]));
    pk_array_release(&context, &closure);
    assert_true(fabs(largest - residual[0]) <= EITHER(1e-12, 1e-3) * fmax(1, largest));
    assert_true(exists(in_root("compared/compare.gp")));
    if (system("gnuplot --version >/dev/null 2>&1") != 0)
        print_message("no picture: gnuplot is not installed\n");
    else if (!exists(in_root("compared/compare.png")))
        fail_msg("gnuplot is there, and no compare.png");
    assert_false(exists(in_root("compared/compare.csv.part")));
    assert_false(exists(in_root("compared/.pathkernel")));
    /* Again, in place of the first one; and a manifest that declares another optimizer. */
    expect(0, "@compare %%/adamw --inputs %%/x.npy --out %%/compared --threads 1");
    shell(
        "rm -rf forgotten-too && cp -r relu forgotten-too && sed -i 's/momentum=0.9//' forgotten-too/run.txt");
    expect(1, "@compare %%/forgotten-too --inputs %%/x.npy --out %%/compared");
    assert_non_null(strstr(complained, "the declared training"));
}

static void test_compare_refuses(void **state)
{
    static const struct {
        const char *arguments, *words;
    } cases[] = {
        {"@compare", "no run directory is given"},
        {"@compare %/tanh", "--inputs X.npy is missing"},
        {"@compare %/tanh --inputs %/x.npy", "--out DIR is missing"},
        {"@compare %/gone --inputs %/x.npy --out %/no", "/gone/run.txt: No such file"},
        {"@compare %/tanh --inputs %/gone.npy --out %/no", "--inputs: "},
        {"@compare %/tanh --inputs %/bad-wide.npy --out %/no", "rows of 5 numbers; the network takes 4"},
        {"@compare %/tanh --inputs %/bad-nan.npy --out %/no", "bad-nan.npy: row 3, number 1 is NaN"},
        {"@compare %/tanh --inputs %/x.npy --out %/x.npy", "there is a file of that name"},
        {"@compare %/tanh --inputs %/x.npy --out %/no --threads 0", "--threads: '0' is not"},
        {"@compare %/tanh --inputs %/x.npy --out %/no --memory 1K", "--memory: "},
        {"@compare %/tanh --inputs %/x.npy --out %/no --ouputs 1", "unknown option '--ouputs'"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_refused(cases[i].arguments, cases[i].words);
        assert_false(exists(in_root("no")));
    }
}

/* What a user sees who does not know the program. */
static void test_subcommands(void **state)
{
    static const char *const names[] = {"train", "decompose", "kernel", "compare"};
    (void)state;
    expect_refused("@", "no subcommand is given; these are: train, decompose, kernel, compare");
    expect_refused("@trian",
                   "'trian' is not a subcommand (is it train?); these are: train, decompose, kernel, compare");
    expect_refused("@dcompose --help", "(is it decompose?)");
    expect_refused("@tanh --inputs x", "'tanh' is not a subcommand");
    expect_refused("@--inputs x", "'--inputs' is not a subcommand");
    expect(0, "@--version");
    assert_string_equal(told, "pathkernel " PK_VERSION "\n");
    expect(0, "@train --version");
    assert_string_equal(told, "pathkernel train " PK_VERSION "\n");
    expect(0, "@--help");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        assert_non_null(strstr(told, names[i]));
    expect(0, "@help");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char usage[60], first[TEXT];
        expect(0, "@%s --help", names[i]);
        snprintf(usage, sizeof usage, "usage: pathkernel %s ", names[i]);
        assert_int_equal(strncmp(told, usage, strlen(usage)), 0);
        assert_string_equal(complained, "");
        memcpy(first, told, sizeof first);
        expect(0, "@help %s", names[i]);
        assert_string_equal(told, first);
    }
    /* The tables of the library. */
    expect(0, "@train --help");
    for (int i = PK_SQUARED; i <= PK_HINGE; i++)
        assert_non_null(strstr(told, pk_loss_name((pk_loss)i)));
    for (int i = 0; pk_optimizer_name((pk_optimizer_kind)i); i++)
        assert_non_null(strstr(told, pk_optimizer_name((pk_optimizer_kind)i)));
    for (size_t i = 0; pk_network_layer(i); i++)
        assert_non_null(strstr(told, pk_network_layer(i)));
    expect(0, "@decompose --help");
    for (int i = 0; pk_rule_name((pk_rule)i); i++)
        assert_non_null(strstr(told, pk_rule_name((pk_rule)i)));
    expect(0, "@kernel --help");
    for (int i = 1; pk_kernel_name((pk_kernel_kind)i); i++)
        assert_non_null(strstr(told, pk_kernel_name((pk_kernel_kind)i)));
    expect_refused("@decompose %/tanh --input %/x.npy", "unknown option '--input' (is it --inputs?)");
    /* Both names do the same. */
    expect(0, "@decompose %%/tanh --inputs %%/x.npy --out %%/by-name --top 0");
    expect(0, "%%/tanh --inputs %%/x.npy --out %%/by-other-name --top 0");
    check_all_same("by-name", "by-other-name");
}

int main(int count, char **arguments)
{
    const char *given = getenv("PATHKERNEL_DECOMPOSE");
    const char *slash = count > 0 ? strrchr(arguments[0], '/') : NULL;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_subcommands),
        cmocka_unit_test(test_train),
        cmocka_unit_test(test_train_bits),
        cmocka_unit_test(test_train_rates),
        cmocka_unit_test(test_train_refuses),
        cmocka_unit_test(test_train_resumes),
        cmocka_unit_test(test_train_diverges),
        cmocka_unit_test(test_results),
        cmocka_unit_test(test_kernel),
        cmocka_unit_test(test_kernel_steps),
        cmocka_unit_test(test_kernel_refuses),
        cmocka_unit_test(test_compare),
        cmocka_unit_test(test_compare_refuses),
        cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_input_types),
        cmocka_unit_test(test_axes),
        cmocka_unit_test(test_until),
        cmocka_unit_test(test_averages),
        cmocka_unit_test(test_recover),
        cmocka_unit_test(test_not_closed),
        cmocka_unit_test(test_bounds),
        cmocka_unit_test(test_no_steps),
        cmocka_unit_test(test_printed),
        cmocka_unit_test(test_wrong_optimizer),
        cmocka_unit_test(test_bad_arguments),
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_unwritable),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_short_spin),
#ifdef __linux__
        cmocka_unit_test(test_small_disk),
#endif
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_terminal),
        cmocka_unit_test(test_again),
        cmocka_unit_test(test_closed_streams),
        cmocka_unit_test(test_one_folder),
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_shrinking),
        cmocka_unit_test(test_memory_of_inputs),
#ifdef __linux__
        cmocka_unit_test(test_kill_publishing),
#endif
    };
    if (given)
        snprintf(program, sizeof program, "%s", given);
    else
        snprintf(program, sizeof program, "%.*s/pathkernel-decompose", slash ? (int)(slash - arguments[0]) : 1,
                 slash ? arguments[0] : ".");
    if (access(program, X_OK) != 0) {
        fprintf(stderr, "%s: not there; build it, or set PATHKERNEL_DECOMPOSE\n", program);
        return 1;
    }
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
