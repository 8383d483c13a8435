/* Fuzz target: the program's arguments and the folder that its results go to. The first byte says what stands in that
 * folder before, and by its bit 64 by which name the program is called; the others are words, one a line, and the program
 * runs in this process, in a folder of its own with three runs and a few arrays. It ends with 0, 1 or 2, and 2 comes with one line on standard error. What the results do not own is as before.
 */
#include "fuzz.h"

#ifdef PATHKERNEL_TEST_AMALGAM
#include "pathkernel.h"
#else /* the program's own include finds everything there */
#define PATHKERNEL_H
#define PATHKERNEL_INTERNALS_DECLARED
#define PATHKERNEL_IMPLEMENTED
#endif
/* It must not start another program in this one's place, nor end this one. */
static inline int fuzz_no_exec(void)
{
    errno = ENOSYS;
    return -1;
}
#define execv(path, arguments) ((void)(path), (void)(arguments), fuzz_no_exec())
#define execvp(path, arguments) ((void)(path), (void)(arguments), fuzz_no_exec())
#define execve(path, arguments, environment) ((void)(path), (void)(arguments), fuzz_no_exec())
#define main fuzz_program_main
#include "../examples/program/options.c"
#include "../examples/program/report.c"
#include "../examples/program/folder.c"
#include "../examples/program/schedule.c"
#include "../examples/program/train.c"
#include "../examples/program/decompose.c"
#include "../examples/program/kernel.c"
#include "../examples/program/compare.c"
#include "../examples/program/arrays.c"
#include "../examples/program/machine.c"
#include "../examples/program/measure.c"
#include "../examples/program/influence.c"
#include "../examples/program/main.c"
#undef main
#undef execv
#undef execvp
#undef execve

enum { FUZZ_WORDS = 40, FUZZ_TOLD = 1 << 16 };

static int fuzz_told[2] = {-1, -1}, fuzz_home = -1; /* what catches standard output and error; the folder */

static void fuzz_array_file(const char *name, pk_type type, size_t rows, size_t columns, const void *data)
{
    const size_t shape[2] = {rows, columns};
    FUZZ_REQUIRE(pk_array_write(NULL, name, type, columns ? 2 : 1, shape, data) == PK_OK);
}

static void fuzz_program_run(const char *folder, const char *network, const char *optimizer, size_t keep_every)
{
    pk_context context;
    pk_graph graph;
    pk_train_options options;
    pk_real inputs[8], weights[64];
    int64_t labels[4] = {0, 1, 1, 0};
    const size_t shape[2] = {4, 2};
    pk_dataset train;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    context.threads = 1;
    for (size_t i = 0; i < 8; i++)
        inputs[i] = (pk_real)(((double)(i * i % 5) - 2) / 2);
    train.inputs = pk_array_view(REAL_TYPE, 2, shape, inputs);
    train.targets = pk_array_view(PK_INT64, 1, shape, labels);
    FUZZ_REQUIRE(pk_network_parse(&context, network, &graph) == PK_OK);
    FUZZ_REQUIRE(pk_optimizer_parse(&context, optimizer, &options.optimizer) == PK_OK);
    FUZZ_REQUIRE(graph.parameters <= 64 && pk_network_initialize(&context, &graph, 2, weights) == PK_OK);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 0.05;
    options.steps = 3;
    options.batch_size = 2;
    options.record = folder;
    options.keep_every = keep_every;
    FUZZ_REQUIRE(pk_train(&context, &graph, &train, &options, weights, NULL) == PK_OK);
    pk_graph_release(&context, &graph);
}

static int fuzz_catcher(void)
{
#ifdef __linux__
    int file = memfd_create("told", MFD_CLOEXEC);
#else
    int file = open("told", O_RDWR | O_CREAT | O_TRUNC, 0666);
    (void)unlink("told");
#endif
    FUZZ_REQUIRE(file >= 0);
    return file;
}

/* Once: the folder that the program runs in, and what catches what it says. */
static void fuzz_program_begin(void)
{
    static const double numbers[6] = {0.5, -1, 0.25, 2, -0.5, 1};
    static const int64_t labels[3] = {1, 0, 1}, high[3] = {1, 7, 1};
    static const float narrow[6] = {0.5f, -1, 0.25f, 2, -0.5f, 1};
    char path[400];
    if (fuzz_home >= 0)
        return;
    snprintf(path, sizeof path, "%s/program", fuzz_enter());
    FUZZ_REQUIRE(mkdir(path, 0777) == 0);
    int before = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    FUZZ_REQUIRE(before >= 0 && chdir(path) == 0);
    fuzz_home = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    FUZZ_REQUIRE(fuzz_home >= 0);
    fuzz_program_run("tanh", "input 2; dense 3; tanh; dense 2", "adam", 1);
    fuzz_program_run("relu", "input 2; dense 3; relu; dense 2", "sgd", 1);
    fuzz_program_run("kept", "input 2; dense 3; relu; dense 2", "sgd momentum=0.9", 2);
    fuzz_array_file("x.npy", PK_FLOAT64, 3, 2, numbers);
    fuzz_array_file("x4.npy", PK_FLOAT32, 3, 2, narrow);
    fuzz_array_file("y.npy", PK_INT64, 3, 0, labels);
    fuzz_array_file("high.npy", PK_INT64, 3, 0, high);
    fuzz_array_file("wide.npy", PK_FLOAT64, 2, 3, numbers);
    fuzz_write_file("text.npy", "no array", 8);
    fuzz_told[0] = fuzz_catcher();
    fuzz_told[1] = fuzz_catcher();
    FUZZ_REQUIRE(fchdir(before) == 0);
    close(before);
}

static int fuzz_own(const char *name)
{
    static const char *const own[] = {"tanh",     "relu",     "kept",     "x.npy", "x4.npy", "y.npy",
                                      "high.npy", "wide.npy", "text.npy", ".",     ".."};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (strcmp(name, own[i]) == 0)
            return 1;
    return 0;
}

/* What stands in the results' folder before. */
static void fuzz_prepare(unsigned choice)
{
    static const char *const names[] = {"by_example.npy", "closure.npy", "initial.npy", "by_step.npy"};
    char path[100];
    if (choice % 8 == 0)
        return;
    fuzz_write_file("victim", "precious", 8);
    if (choice % 8 == 7) {
        fuzz_write_file("out", "a file", 6);
        return;
    }
    FUZZ_REQUIRE(mkdir("out", 0777) == 0);
    snprintf(path, sizeof path, "out/%s%s", names[choice / 8 % 4], choice / 32 % 2 ? ".part" : "");
    switch (choice % 8) {
    case 1: fuzz_write_file(path, "older", 5); break;
    case 2: FUZZ_REQUIRE(mkdir(path, 0777) == 0); break;
    case 3: FUZZ_REQUIRE(symlink("../victim", path) == 0); break;
    case 4: FUZZ_REQUIRE(symlink("nowhere", path) == 0); break;
    case 5: FUZZ_REQUIRE(mkfifo(path, 0666) == 0); break;
    case 6:
        FUZZ_REQUIRE(symlink(path + 4, path) == 0); /* to itself */
        break;
    }
}

static size_t fuzz_take_told(int which, char *text)
{
    ssize_t got = pread(fuzz_told[which], text, FUZZ_TOLD - 1, 0);
    FUZZ_REQUIRE(got >= 0);
    text[got] = 0;
    return (size_t)got;
}

/* Runs the program in the folder; its exit status. What it told is in fuzz_told. */
static int fuzz_program_call(int count, char **words)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGXFSZ};
    struct sigaction actions[5];
    int kept[2];
    fflush(stdout);
    fflush(stderr);
    for (int i = 0; i < 2; i++) {
        FUZZ_REQUIRE(ftruncate(fuzz_told[i], 0) == 0 && lseek(fuzz_told[i], 0, SEEK_SET) == 0);
        kept[i] = fcntl(i + 1, F_DUPFD_CLOEXEC, 10);
        FUZZ_REQUIRE(kept[i] >= 0 && dup2(fuzz_told[i], i + 1) >= 0);
    }
    for (int i = 0; i < 5; i++)
        (void)sigaction(numbers[i], NULL, &actions[i]);
    fuzz_tell_inside(1);
    int status = fuzz_program_main(count, words);
    fflush(stdout);
    fflush(stderr);
    fuzz_tell_inside(0);
    clearerr(stdout);
    clearerr(stderr);
    for (int i = 0; i < 5; i++)
        (void)sigaction(numbers[i], &actions[i], NULL);
    for (int i = 0; i < 2; i++) {
        FUZZ_REQUIRE(dup2(kept[i], i + 1) >= 0);
        close(kept[i]);
    }
    return status;
}

/* One line, without commands to a terminal. */
static int fuzz_one_line(const char *text)
{
    size_t length = strlen(text);
    if (length < 3 || text[length - 1] != '\n')
        return 0;
    for (size_t i = 0; i + 1 < length; i++)
        if ((unsigned char)text[i] < ' ' || text[i] == 127)
            return 0;
    return 1;
}

static void fuzz_check_told(int status, const char *told, const char *complained)
{
    int right = status >= 0 && status <= 2;
    if (status ==
        2) /* parts that were complete before the results could not be put in place have been printed */
        right = (!*told || strncmp(told, "strongest examples", 18) == 0) && fuzz_one_line(complained);
    else if (status == 0)
        right = *told != 0;
    if (!right)
        fprintf(stderr, "status %d, told: %s\ncomplained: %s\n", status, told, complained);
    FUZZ_REQUIRE(right);
}

/* Everything that the program made, after a look at the results. */
static void fuzz_tidy(void)
{
    DIR *entries = opendir(".");
    FUZZ_REQUIRE(entries);
    for (struct dirent *entry; (entry = readdir(entries)) != NULL;) {
        struct stat info;
        if (fuzz_own(entry->d_name))
            continue;
        if (lstat(entry->d_name, &info) == 0 && S_ISDIR(info.st_mode))
            fuzz_clear(entry->d_name);
        else
            (void)unlink(entry->d_name);
    }
    closedir(entries);
}

/* The five that are always there have one shape. */
static void fuzz_check_results(const char *folder)
{
    static const char *const names[] = {"initial", "final", "decay", "unattributed", "closure"};
    pk_array five[5];
    char path[700];
    for (int i = 0; i < 5; i++) {
        snprintf(path, sizeof path, "%.600s/%s.npy", folder, names[i]);
        FUZZ_REQUIRE(pk_array_map(NULL, path, 0, &five[i]) == PK_OK);
        FUZZ_REQUIRE(five[i].type == PK_FLOAT64 && five[i].rank == 2 && five[i].shape[0] == five[0].shape[0] &&
                     five[i].shape[1] == five[0].shape[1]);
    }
    for (int i = 0; i < 5; i++)
        pk_array_release(NULL, &five[i]);
}

static int fuzz_program(const uint8_t *data, size_t size)
{
    static char told[FUZZ_TOLD], complained[FUZZ_TOLD];
    char *words[FUZZ_WORDS + 2], *text = (char *)malloc(size + 1), name[] = "pathkernel-decompose";
    static const char program[] = "pathkernel";
    const char *out = NULL;
    int count = 0, verbose = 0;
    const unsigned choice = size ? data[0] : 0;
    FUZZ_REQUIRE(text);
    if (size > 1)
        memcpy(text, data + 1, size - 1);
    text[size ? size - 1 : 0] = 0;
    words[count++] = name;
    for (char *word = strtok(text, "\n"); word && count <= FUZZ_WORDS; word = strtok(NULL, "\n")) {
        words[count++] = word;
        /* It stays in its folder, whatever names are made up. */
        if (*word == '/' || strstr(word, "..") || strstr(word, "=/")) {
            free(text);
            return 0;
        }
    }
    words[count] = NULL;
    if (choice & 64) {
        memcpy(name, program, sizeof program);
        /* Long jobs are not what is looked for. */
        for (int i = 1; i < count; i++)
            for (char *digits = words[i]; *digits; digits++)
                if (strspn(digits, "0123456789eE.") > 3) {
                    free(text);
                    return 0;
                }
    }
    const int decomposes = !(choice & 64) || (count > 1 && strcmp(words[1], "decompose") == 0);
    for (int i = 1; i < count; i++) {
        out = strcmp(words[i], "--out") == 0        ? words[i + 1]
              : strncmp(words[i], "--out=", 6) == 0 ? words[i] + 6
                                                    : out;
        verbose |= strcmp(words[i], "--verbose") == 0;
    }
    fuzz_program_begin();
    int before = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    FUZZ_REQUIRE(before >= 0 && fchdir(fuzz_home) == 0);
    fuzz_prepare(choice);
    const int status = fuzz_program_call(count, words);
    fuzz_take_told(0, told);
    fuzz_take_told(1, complained);
    if (!verbose)
        fuzz_check_told(status, told, complained);
    FUZZ_REQUIRE(status >= 0 && status <= 2);
    if (status < 2 && decomposes && out && strlen(out) < 600 && strncmp(told, "usage", 5) != 0 &&
        strncmp(told, "pathkernel", 10) != 0)
        fuzz_check_results(out);
    if (choice % 8) {
        size_t length;
        uint8_t *victim = fuzz_read_file("victim", &length);
        FUZZ_REQUIRE(victim && length == 8 && memcmp(victim, "precious", 8) == 0);
        free(victim);
    }
    fuzz_tidy();
    FUZZ_REQUIRE(fchdir(before) == 0);
    close(before);
    free(text);
    return 0;
}
