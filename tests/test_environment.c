/* The program in environments that others set up: OpenMP's and BLIS's variables with odd, large, small and wrong values.
 * It ends, with the same bytes. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include "fixture.h"

/* A sanitizer's frames are larger. */
#ifdef __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SMALL_STACK "OMP_STACKSIZE=2M"
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define SMALL_STACK "OMP_STACKSIZE=2M"
#endif
#ifndef SMALL_STACK
#define SMALL_STACK "OMP_STACKSIZE=64K"
#endif

static char program[1000], run_path[300], inputs_path[300], plain_path[300], out_path[300];

/* Runs the program with these variables (blanks between, ',' inside of values) and none other of their kind. */
static int run_program(const char *variables, const char *folder)
{
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        static char copy[500];
        char errors[400];
        static const char *const known[] = {"OMP_NUM_THREADS", "OMP_DYNAMIC",          "OMP_THREAD_LIMIT",
                                            "OMP_NESTED",      "OMP_PROC_BIND",        "OMP_PLACES",
                                            "OMP_STACKSIZE",   "OMP_SCHEDULE",         "OMP_CANCELLATION",
                                            "OMP_WAIT_POLICY", "BLIS_NUM_THREADS",     "GOMP_CPU_AFFINITY",
                                            "GOMP_SPINCOUNT",  "OMP_MAX_ACTIVE_LEVELS"};
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            unsetenv(known[i]);
        snprintf(copy, sizeof copy, "%s", variables);
        for (char *word = strtok(copy, " "); word; word = strtok(NULL, " "))
            putenv(word);
        snprintf(errors, sizeof errors, "%s/errors", fixture_folder);
        int nothing = open("/dev/null", O_WRONLY), told = open(errors, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (nothing < 0 || told < 0 || dup2(nothing, 1) < 0 || dup2(told, 2) < 0)
            _exit(99);
        alarm(300); /* it must not hang */
        execl(program, program, run_path, "--inputs", inputs_path, "--out", folder, "--keep", "train", "--keep",
              "step", "--top", "0", (char *)NULL);
        _exit(98);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFEXITED(status))
        fail_msg("%s: ended by signal %d", variables, WTERMSIG(status));
    return WEXITSTATUS(status);
}

static void check_same(const char *variables)
{
    static const char *const names[] = {"by_example", "by_step",      "initial", "final",
                                        "decay",      "unattributed", "closure"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char one[400], other[400];
        pk_array a, b;
        snprintf(one, sizeof one, "%.300s/%s.npy", plain_path, names[i]);
        snprintf(other, sizeof other, "%.300s/%s.npy", out_path, names[i]);
        assert_int_equal(pk_array_map(NULL, one, 0, &a), PK_OK);
        assert_int_equal(pk_array_map(NULL, other, 0, &b), PK_OK);
        if (pk_array_items(&a) != pk_array_items(&b) ||
            memcmp(a.data, b.data, pk_array_items(&a) * pk_type_size(a.type)) != 0)
            fail_msg("%s: %s.npy has other bytes", variables, names[i]);
        pk_array_release(NULL, &a);
        pk_array_release(NULL, &b);
    }
}

static void test_environments(void **state)
{
    /* The values that make a difference to the runtimes, or that they complain about. */
    static const char *const environments[] = {
        "OMP_NUM_THREADS=0",
        "OMP_NUM_THREADS=-3",
        "OMP_NUM_THREADS=1",
        "OMP_NUM_THREADS=64",
        "OMP_NUM_THREADS=3,2,1 OMP_MAX_ACTIVE_LEVELS=3 OMP_NESTED=true",
        "OMP_DYNAMIC=true OMP_NUM_THREADS=16",
        "OMP_THREAD_LIMIT=1 OMP_NUM_THREADS=8",
        "OMP_THREAD_LIMIT=3 OMP_NUM_THREADS=8 OMP_NESTED=true",
        "OMP_MAX_ACTIVE_LEVELS=0",
        "OMP_PROC_BIND=true OMP_PLACES=threads OMP_NUM_THREADS=4",
        "OMP_PLACES={0},{99999} OMP_PROC_BIND=spread",
        SMALL_STACK " OMP_NUM_THREADS=4",
        "OMP_STACKSIZE=nonsense",
        "OMP_SCHEDULE=guided,7 OMP_CANCELLATION=true",
        "OMP_WAIT_POLICY=active OMP_NUM_THREADS=3",
        "GOMP_SPINCOUNT=0 OMP_NUM_THREADS=3",
        "GOMP_CPU_AFFINITY=0 OMP_NUM_THREADS=3",
        "BLIS_NUM_THREADS=7 OMP_NUM_THREADS=2 OMP_DYNAMIC=true OMP_NESTED=true",
        "BLIS_NUM_THREADS=-1",
    };
    bf_run brute;
    const bf_recipe recipe = fixture_recipe(11, 300, 4, 150, 0.1);
    pk_context context;
    pk_graph graph;
    pk_train_options options;
    (void)state;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    context.threads = 1;
    fixture_make("input 4; dense 9; relu; dense 8; tanh; dense 3", BF_SOFTMAX_CROSS_ENTROPY, "adamw", &recipe,
                 &brute);
    const size_t shape[2] = {300, 4}, rows[2] = {70, 4};
    pk_dataset train;
    train.inputs = pk_array_view(REAL_TYPE, 2, shape, brute.inputs);
    train.targets = pk_array_view(PK_INT64, 1, shape, brute.labels);
    assert_ok(&context, pk_network_parse(&context, "input 4; dense 9; relu; dense 8; tanh; dense 3", &graph));
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.optimizer = pk_optimizer_adamw();
    options.schedule.rate = 0.01;
    options.steps = 4;
    options.batch_size = 150;
    options.record = run_path;
    assert_ok(&context, pk_train(&context, &graph, &train, &options, brute.weights, NULL));
    assert_int_equal(pk_array_write(NULL, inputs_path, REAL_TYPE, 2, rows, brute.inputs), PK_OK);
    bf_run_free(&brute);
    pk_graph_release(&context, &graph);
    assert_int_equal(run_program("", plain_path), 0);
    for (size_t i = 0; i < sizeof environments / sizeof *environments; i++) {
        int status = run_program(environments[i], out_path);
        if (status != 0)
            fail_msg("%s: exit status %d", environments[i], status);
        check_same(environments[i]);
        fixture_clear(out_path);
    }
    print_message("%zu environments, the same bytes\n", sizeof environments / sizeof *environments);
}

static int begin(void **state)
{
    const char *given = getenv("PATHKERNEL_DECOMPOSE");
    if (fixture_enter(state))
        return -1;
    snprintf(program, sizeof program, "%s", given ? given : "build/test/pathkernel-decompose");
    if (access(program, X_OK) != 0) {
        fprintf(stderr, "%s: not there; build it, or set PATHKERNEL_DECOMPOSE\n", program);
        return -1;
    }
    snprintf(run_path, sizeof run_path, "%s/recorded", fixture_folder);
    snprintf(inputs_path, sizeof inputs_path, "%s/inputs.npy", fixture_folder);
    snprintf(plain_path, sizeof plain_path, "%s/plain", fixture_folder);
    snprintf(out_path, sizeof out_path, "%s/out", fixture_folder);
    return 0;
}

static int end(void **state)
{
    fixture_clear(run_path);
    fixture_clear(plain_path);
    fixture_clear(out_path);
    return fixture_leave(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_environments)};
    return cmocka_run_group_tests(tests, begin, end);
}
