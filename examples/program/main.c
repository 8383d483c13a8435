/* pathkernel: kernel machines that trained networks are, from the command line.
 *
 *     pathkernel SUBCOMMAND ...        (--help lists them, SUBCOMMAND --help its options)
 *     pathkernel-decompose ...         the same as pathkernel decompose ...
 *
 * To add a subcommand, write its file with a program_command and add it to the table here. */
#include "program.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const program_command *const commands[] = {&train_command,    &decompose_command, &kernel_command,
                                                  &compare_command,  &machine_command,   &measure_command,
                                                  &influence_command};
enum { COMMANDS = (int)(sizeof commands / sizeof *commands) };

static char **program_arguments;

/* ---- help ---------------------------------------------------------------------------------------------- */

static int print_commands(void)
{
    printf("usage: pathkernel SUBCOMMAND ...\n\nKernel machines that trained networks are: training runs, and "
           "what "
           "each training example contributed\nto each output.\n\n");
    for (int i = 0; i < COMMANDS; i++)
        printf("  %-12s%s\n", commands[i]->name, commands[i]->summary);
    printf(
        "\n`pathkernel SUBCOMMAND --help` lists the options of a subcommand. Inputs and results are NumPy's "
        ".npy "
        "files.\nExit status: 0 done; 1 done, but a stated tolerance was missed; 2 anything else, with a line "
        "that says what and where.\n");
    return fflush(stdout) != 0 || ferror(stdout) ? PROGRAM_FAILED : PROGRAM_DONE;
}

/* "train, decompose" */
static const char *list_commands(char text[200])
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < COMMANDS && used < 150; i++)
        used += (size_t)snprintf(text + used, 200 - used, "%s%s", i ? ", " : "", commands[i]->name);
    return text;
}

static int refuse_command(const char *word)
{
    const char *names[COMMANDS], *nearest;
    char list[200];
    for (int i = 0; i < COMMANDS; i++)
        names[i] = commands[i]->name;
    nearest = nearest_word(word, COMMANDS, names);
    return refuse("'%s' is not a subcommand%s%s%s; these are: %s; --help tells more", word,
                  nearest ? " (is it " : "", nearest ? nearest : "", nearest ? "?)" : "", list_commands(list));
}

/* ---- before a subcommand runs -------------------------------------------------------------------------- */

/* Threads of OpenMP wait for each other by spinning, in gcc's libgomp for milliseconds: beside another program that is what
 * keeps a processor from the thread that is waited for. How long they spin can be said in the environment only, before the
 * program starts: so it starts itself again, once, unless the user has said something about it. */
void start_with_short_spin(int threads)
{
#ifdef _OPENMP
    static const char *const said[] = {"PATHKERNEL_RESTARTED", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"};
    char program[4096];
    for (size_t i = 0; i < sizeof said / sizeof *said; i++)
        if (getenv(said[i]))
            return;
    if (threads == 1 || (threads == 0 && pk_threads(NULL) == 1))
        return;
    ssize_t length =
        readlink("/proc/self/exe", program, sizeof program - 1); /* elsewhere than on Linux there is none */
    if (length <= 0 || (size_t)length >= sizeof program - 1)
        return;
    program[length] = 0;
    if (setenv("PATHKERNEL_RESTARTED", "1", 1) == 0 && setenv("GOMP_SPINCOUNT", "2000", 1) == 0)
        execv(program, program_arguments); /* where that fails, the job is done all the same */
#else
    (void)threads, (void)program_arguments;
#endif
}

/* Where a standard stream is closed, nothing else may take its place. */
static void fill_streams(void)
{
    for (int file = STDIN_FILENO; file <= STDERR_FILENO; file++)
        if (fcntl(file, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0)
            (void)open("/", O_RDONLY);
}

static int run_command(const program_command *command, int count, char **arguments)
{
    snprintf(program_name, sizeof program_name, "pathkernel %s", command->name);
    return command->run(command, count, arguments);
}

int main(int count, char **arguments)
{
    const char *slash = count > 0 ? strrchr(arguments[0], '/') : NULL;
    const char *name = slash ? slash + 1 : count > 0 ? arguments[0] : "pathkernel";
    fill_streams();
    program_arguments = arguments;
    if (strcmp(name, "pathkernel-decompose") == 0) {
        snprintf(program_name, sizeof program_name, "%s", name);
        return decompose_command.run(&decompose_command, count - 1, arguments + 1);
    }
    snprintf(program_name, sizeof program_name, "pathkernel");
    if (count < 2) {
        char list[200];
        return refuse("no subcommand is given; these are: %s; --help tells more", list_commands(list));
    }
    const char *word = arguments[1];
    const int help = strcmp(word, "help") == 0;
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || (help && count == 2))
        return print_commands();
    if (strcmp(word, "--version") == 0)
        return printf("pathkernel %s\n", pk_version()) < 0 || fflush(stdout) != 0 ? PROGRAM_FAILED
                                                                                  : PROGRAM_DONE;
    char option[] = "--help", *only_help[] = {option, NULL};
    word = help ? arguments[2] : word;
    for (int i = 0; i < COMMANDS; i++)
        if (strcmp(word, commands[i]->name) == 0)
            return help ? run_command(commands[i], 1, only_help)
                        : run_command(commands[i], count - 2, arguments + 2);
    return refuse_command(word);
}
