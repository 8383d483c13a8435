/* What the files of the program `pathkernel` share. A subcommand is one file and one row of the table in main.c:
 *
 *     main.c        the table of subcommands, --help, what happens before one of them runs
 *     options.c     the arguments of a subcommand, read and explained from a table of options
 *     report.c      messages, progress, signals
 *     folder.c      a folder of results that take their names all at once
 *     train.c, schedule.c, decompose.c, kernel.c, compare.c    the subcommands
 *     library.c     the library
 *
 * Exit status: 0 done, 1 done but a stated tolerance was missed, 2 anything else, with one line on standard error that
 * says what and where. */
#ifndef PATHKERNEL_PROGRAM_H
#define PATHKERNEL_PROGRAM_H
#include "pathkernel.h"
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define PROGRAM_FORMAT(text, first) __attribute__((format(printf, text, first)))
#else
#define PROGRAM_FORMAT(text, first)
#endif

/* Exit statuses, and what a part of a job returns for the job to go on. */
enum { PROGRAM_DONE = 0, PROGRAM_MISSED = 1, PROGRAM_FAILED = 2, PROGRAM_GO_ON = -1 };

/* ---- subcommands --------------------------------------------------------------------------------------- */

/* --NAME VALUE. A table of options ends with a NULL name. */
typedef struct program_option {
    const char *name, *value; /* "--inputs", "X.npy"; value NULL: there is none */
    int required;
    size_t place; /* in the subcommand's settings, an offsetof */
    /* Reads a value into its place; 0 where it is not what is wanted. Where `wanted` is NULL, the context's message tells. */
    int (*parse)(pk_context *context, const char *text, void *place);
    const char *wanted;
    const char *help;
    const char *(*names)(
        size_t index); /* those that are known, for the help; NULL behind the last one; or NULL */
} program_option;

typedef struct program_command {
    const char *name;
    const char *argument; /* what it takes beside options, such as RUN; NULL: nothing */
    const char *what;     /* the argument in words, such as "run directory" */
    const char *summary;  /* a line */
    const char *about;    /* more lines, or NULL */
    const char *after;    /* what the help ends with, or NULL */
    const program_option *options;
    int (*run)(const struct program_command *command, int count,
               char **arguments); /* without the program's name */
} program_command;

extern const program_command train_command, decompose_command, kernel_command, compare_command, machine_command,
    measure_command, influence_command;

/* "pathkernel train", which begins each message. */
extern char program_name[64];

/* ---- options.c ----------------------------------------------------------------------------------------- */

/* Reads the arguments into settings, whose first member is the `const char *` of the argument, if the command takes one. given: a bit for each
 * option that is there. PROGRAM_GO_ON, or an exit status after --help, --version or a message. */
int options_parse(const program_command *command, int count, char **arguments, void *settings, uint64_t *given);
int options_given(const program_command *command, uint64_t given, const char *name);

int parse_text(pk_context *context, const char *text, void *place);           /* const char * */
int parse_flag(pk_context *context, const char *text, void *place);           /* int */
int parse_whole(pk_context *context, const char *text, void *place);          /* size_t */
int parse_positive_whole(pk_context *context, const char *text, void *place); /* size_t */
int parse_positive(pk_context *context, const char *text, void *place);       /* double */
int parse_not_negative(pk_context *context, const char *text, void *place);   /* double */
int parse_memory(pk_context *context, const char *text, void *place);         /* size_t, bytes */
int parse_threads(pk_context *context, const char *text, void *place);        /* int */
int parse_rule(pk_context *context, const char *text, void *place);           /* pk_quadrature */
int parse_size(const char *text, size_t *number);                             /* digits, and nothing else */

const char *rule_names(size_t index);

/* The word of a list that is nearest to one that is not in it; NULL where none is near. */
const char *nearest_word(const char *word, size_t count, const char *const *words);

/* Options that several subcommands have. settings: the type; its members threads and memory. */
#define OPTION_THREADS(settings)                                                                          \
    {                                                                                                     \
        "--threads", "N", 0, offsetof(settings, threads), parse_threads, "a whole number from 1 to 1024", \
            "default: all; the results do not depend on it", NULL                                         \
    }
#define OPTION_MEMORY(settings)                                                                                \
    {                                                                                                          \
        "--memory", "SIZE", 0, offsetof(settings, memory), parse_memory, "a size such as 2G, 64M or 512K",     \
            "the most memory for data, such as 2G, 64M or 512K; default 2G;\nthe results do not depend on it", \
            NULL                                                                                               \
    }
#define OPTIONS_END                              \
    {                                            \
        NULL, NULL, 0, 0, NULL, NULL, NULL, NULL \
    }
#define PROGRAM_MEMORY ((size_t)2 << 30)

/* ---- report.c ------------------------------------------------------------------------------------------ */

/* One line on standard error, whatever the arguments contain. Returns PROGRAM_FAILED. */
PROGRAM_FORMAT(1, 2) int refuse(const char *format, ...);

/* The same of a run that could not be opened. */
int refuse_run(const pk_context *context, pk_status status, const char *run);

void clear_line(void); /* a progress line on the terminal, if there is one */
double program_seconds(void);
const char *duration(double seconds, char text[32]);
const char *size_text(double bytes, char text[32]);
const char *shape_text(const pk_array *array, char text[200]);

/* A job's progress, for pk_context.progress: a line on the terminal with an estimate, and whether a signal came. */
typedef struct program_progress {
    int terminal, verbose;
    char detail[48]; /* such as ", 3 of 10 inputs" */
    /* Private: */
    const char *phase;
    double begin, phase_begin, last_shown;
} program_progress;
/* Begins the job of a subcommand, after its arguments are read: with how many threads (0: all), and progress from the context.
 * May start the program again (start_with_short_spin). */
void start_job(pk_context *context, program_progress *progress, int threads, int verbose);

/* From here on a first SIGINT, SIGTERM or SIGHUP cancels the job, and a second one ends the program. */
void catch_signals(const program_progress *progress);

/* From here on the program tells which of these files became shorter while it was mapped, and ends. */
void watch_array(const char *name, const pk_array *array);
void watch_run(const pk_run *run);

/* ---- folder.c ------------------------------------------------------------------------------------------ */

enum { FOLDER_FILES = 16 };

/* A folder of results. Each is written as NAME.part, part by part, and they take their names all at once: whoever reads
 * the folder, and whoever finds it after a kill, has the older results or the new ones. It is locked meanwhile. */
typedef struct program_folder {
    const char *path;
    struct {
        char name[48];
        int made; /* NAME.part is there, and ours */
    } files[FOLDER_FILES];
    size_t count;
    int descriptor; /* + 1; 0: none */
    int is_new;     /* the program made it */
    char problem[600];
} program_folder;

/* Makes the folder and those above it, and locks it. option: its name in messages. PROGRAM_GO_ON or PROGRAM_FAILED. */
int folder_open(program_folder *folder, const char *path, const char *option);
/* Tidies up after a job that was killed, and makes room for the new names. 0 and folder->problem. */
int folder_prepare(program_folder *folder);
/* Gives the complete .part files their names. 0 and folder->problem. */
int folder_publish(program_folder *folder);
/* Removes what is left: .part files, and a new folder where nothing was published (keep: 0). */
void folder_close(program_folder *folder, int keep);
/* Writes an array of float64 as NAME.part. PROGRAM_GO_ON or PROGRAM_FAILED. */
int folder_write(program_folder *folder, pk_context *context, const char *name, int rank, const size_t *shape,
                 const double *data);
/* The last lines of a report: the time since `begin`, and what is in the folder. */
void print_folder(const program_folder *folder, const pk_context *context, double begin);
/* A path in the folder; NULL where there is no memory. The caller frees it. */
char *folder_path(const program_folder *folder, const char *name, const char *suffix);

/* ---- arrays.c ------------------------------------------------------------------------------------------ */

/* A matrix of a file as float64, every number finite; rank 1 has one column where `lists` is 1, and is refused else. The caller releases
 * *numbers. option: its name in messages. PROGRAM_GO_ON or PROGRAM_FAILED. */
int read_matrix(pk_context *context, const char *option, const char *path, int lists, size_t *rows,
                size_t *cols, double **numbers, pk_type *type);

/* ---- main.c -------------------------------------------------------------------------------------------- */

/* Threads of OpenMP that wait for each other spin for a short time only; starts the program again where that takes it. */
void start_with_short_spin(int threads);

#endif
