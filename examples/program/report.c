/* What the program says: messages, progress, and what it does about signals. */
#include "program.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

char program_name[64] = "pathkernel";

/* ---- messages ------------------------------------------------------------------------------------------ */

static int line_on_terminal; /* a progress line stands on the terminal */

void clear_line(void)
{
    if (line_on_terminal)
        fprintf(stderr, "\r%78s\r", "");
    line_on_terminal = 0;
}

double program_seconds(void)
{
    struct timespec now;
    return clock_gettime(CLOCK_MONOTONIC, &now) == 0 ? (double)now.tv_sec + 1e-9 * (double)now.tv_nsec : 0;
}

int refuse(const char *format, ...)
{
    char text[1600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *at = text; *at; at++)
        if ((unsigned char)*at < ' ' || *at == 127)
            *at = '?';
    fflush(stdout);
    clear_line();
    fprintf(stderr, "%s: %s\n", program_name, text);
    return PROGRAM_FAILED;
}

int refuse_run(const pk_context *context, pk_status status, const char *run)
{
    const char *message = pk_message(context);
    const int named = strstr(message, run) != NULL;
    return refuse("%s%s%s%s", status == PK_MEMORY_LIMIT ? "--memory: " : "", named ? "" : run,
                  named ? "" : ": ", message);
}

const char *duration(double seconds, char text[32])
{
    if (seconds < 10)
        snprintf(text, 32, "%.*f s", seconds < 0.1 ? 3 : seconds < 1 ? 2 : 1, seconds);
    else if (seconds < 60)
        snprintf(text, 32, "%.0f s", seconds);
    else if (seconds < 3600)
        snprintf(text, 32, "%d min %02d s", (int)seconds / 60, (int)seconds % 60);
    else
        snprintf(text, 32, "%.0f h %02d min", floor(seconds / 3600), (int)(fmod(seconds, 3600) / 60));
    return text;
}

const char *size_text(double bytes, char text[32])
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    for (; bytes >= 1024 && unit < 4; unit++)
        bytes /= 1024;
    snprintf(text, 32, "%.*f %s", unit && bytes < 100 ? 1 : 0, bytes, units[unit]);
    return text;
}

const char *shape_text(const pk_array *array, char text[200])
{
    size_t used = 0;
    text[used++] = '(';
    for (int i = 0; i < array->rank && used < 160; i++)
        used += (size_t)snprintf(text + used, 200 - used, "%s%zu", i ? ", " : "", array->shape[i]);
    snprintf(text + used, 200 - used, array->rank == 1 ? ",)" : ")");
    return text;
}

/* ---- signals ------------------------------------------------------------------------------------------- */

static volatile sig_atomic_t signalled, tell_signal;

/* A second signal ends the program at once: the handler is installed for one. */
static void on_signal(int number)
{
    static const char text[] = " stopping after the steps in hand; once more ends at once\n";
    int reason = errno;
    signalled = number;
    if (tell_signal && write(STDERR_FILENO, text, sizeof text - 1) < 0)
        tell_signal = 0;
    errno = reason;
}

void catch_signals(const program_progress *progress)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action, old;
    tell_signal = progress->terminal;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = on_signal;
    action.sa_flags = (int)SA_RESETHAND;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (sigaction(numbers[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN) /* nohup */
            (void)sigaction(numbers[i], &action, NULL);
    (void)signal(SIGPIPE, SIG_IGN); /* `| head` must not cost the results */
#ifdef SIGXFSZ
    (void)signal(SIGXFSZ, SIG_IGN); /* a file size limit is a full disk, not a reason to die */
#endif
}

/* The mapped files, for the signal that tells that one has become shorter. */
enum { WATCHED_MOST = 32 };
static struct watched {
    const char *name, *begin, *end;
} watched[WATCHED_MOST];
static size_t watched_count;

static void on_shrunk(int number, siginfo_t *info, void *machine)
{
    static const char begin[] = ": ", end[] = " became shorter while it was read\n";
    const char *at = (const char *)info->si_addr, *name = "a file";
    (void)number;
    (void)machine;
    for (size_t i = 0; i < watched_count; i++)
        if (at >= watched[i].begin && at < watched[i].end)
            name = watched[i].name;
    if (write(STDERR_FILENO, program_name, strlen(program_name)) < 0 ||
        write(STDERR_FILENO, begin, sizeof begin - 1) < 0 || write(STDERR_FILENO, name, strlen(name)) < 0 ||
        write(STDERR_FILENO, end, sizeof end - 1) < 0)
        _exit(PROGRAM_FAILED);
    _exit(PROGRAM_FAILED); /* older results stay, and the next job tidies up */
}

void watch_array(const char *name, const pk_array *array)
{
    struct sigaction action;
    if (!array->mapping || watched_count == WATCHED_MOST)
        return;
    watched[watched_count].name = name;
    watched[watched_count].begin = (const char *)array->mapping;
    watched[watched_count++].end = (const char *)array->mapping + array->mapping_bytes;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_sigaction = on_shrunk;
    action.sa_flags = SA_SIGINFO;
    (void)sigaction(SIGBUS, &action, NULL);
}

void watch_run(const pk_run *run)
{
    const char *name;
    const pk_array *array;
    for (size_t i = 0; (array = pk_run_array(run, i, &name)) != NULL; i++)
        watch_array(name, array);
}

/* ---- progress ------------------------------------------------------------------------------------------ */

static int progress_show(void *user, const char *phase, double fraction)
{
    program_progress *own = (program_progress *)user;
    double now = program_seconds();
    char took[32], left[32];
    if (!own->phase || strcmp(own->phase, phase) != 0) {
        own->phase = phase;
        own->phase_begin = now;
        if (own->verbose) {
            clear_line();
            fprintf(stderr, "%s: %s, after %s\n", program_name, phase, duration(now - own->begin, took));
        }
    }
    if (signalled) {
        line_on_terminal = 0; /* the handler wrote below it */
        return 1;
    }
    if (own->terminal && now - own->begin > 0.3 && now - own->last_shown > 0.1) {
        double spent = now - own->phase_begin;
        char line[128];
        own->last_shown = now;
        int used = snprintf(line, sizeof line, "%.40s %3.0f %%%s, %s", phase, floor(100 * fraction),
                            own->detail, duration(floor(now - own->begin), took));
        if (spent > 1 && fraction > 0.01)
            snprintf(line + used, sizeof line - (size_t)used, ", about %s left",
                     duration(ceil(spent * (1 - fraction) / fraction), left));
        fprintf(stderr, "\r%-77.77s", line);
        fflush(stderr);
        line_on_terminal = 1;
    }
    return 0;
}

void start_job(pk_context *context, program_progress *progress, int threads, int verbose)
{
    start_with_short_spin(threads);
    memset(progress, 0, sizeof *progress);
    progress->terminal = isatty(STDERR_FILENO);
    progress->verbose = verbose;
    progress->begin = program_seconds();
    signalled = 0;
    watched_count = 0;
    context->threads = threads;
    context->progress = progress_show;
    context->progress_user = progress;
}
