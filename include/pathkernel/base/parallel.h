/* pathkernel/base/parallel.h: parallel regions, and their use of threads while other programs run. Private, for all modules.
 *
 * A region ends when its last thread does, and libgomp's threads wait for each other by spinning. If another program
 * occupies one of the processors, a thread waits for one that does not run, and if the two share a processor, the waiting
 * itself keeps the other one from running: 8 to 25 ms for each region, whatever its work, until the scheduler switches. The
 * library therefore watches its regions, by a clock alone and not by the numbers, which stay the same bit for bit:
 *
 *   1. A region measures its time T and the processor time W that its threads took for their tasks: one thread would have
 *      taken about W. The difference W - T, added up over the regions, is what the threads have gained.
 *   2. Where that falls below -PK__LOAD_LOSS, calls with this context go on with one thread, for PK__LOAD_REST times the time
 *      lost, or for twice as long as the last time, up to PK__LOAD_LONGEST seconds.
 *   3. After that, and at the beginning, the threads are on trial: they have to gain in one region, or in several small ones,
 *      before they are trusted. A trial is cheap beside other programs, too: it starts one thread more than there are
 *      processors, which has nothing to do but tells libgomp that spinning does not pay (GOMP_SPINCOUNT: it then spins for
 *      microseconds and sleeps). On an idle machine that costs about 15 microseconds, once.
 *
 * Rejected: a thread pool of our own, whose threads would compete with those of the caller's OpenMP; omp_set_* and
 * environment variables, which are the program's; one thread more in every region, which makes each 10 microseconds longer.
 */
#ifndef PATHKERNEL_PARALLEL_H
#define PATHKERNEL_PARALLEL_H
#include "context.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PARALLEL_IMPLEMENTED)
#define PATHKERNEL_PARALLEL_IMPLEMENTED
/* >>> implementation */
#include <string.h>
#include <time.h>
#include <unistd.h>
PK__BEGIN_COLD_CODE

#ifdef _OPENMP
#define PK__ATOMIC_WRITE PK__PRAGMA(omp atomic write)
#define PK__ATOMIC_ADD PK__PRAGMA(omp atomic)
#define PK__ATOMIC_TAKE PK__PRAGMA(omp atomic capture)
/* Stands before the loop over the tasks of a team. */
#define PK__PARALLEL(team) PK__PRAGMA(omp parallel num_threads((team).started))
#else
#define PK__ATOMIC_WRITE
#define PK__ATOMIC_ADD
#define PK__ATOMIC_TAKE
#define PK__PARALLEL(team)
#endif

/* Seconds: see the top of this file. */
#define PK__LOAD_LOSS 1e-3
#define PK__LOAD_CREDIT 20e-3 /* that is gained before a loss counts for no more */
#define PK__LOAD_REST 20      /* times the loss */
#define PK__LOAD_SHORTEST 10e-3
#define PK__LOAD_LONGEST 2.0
#define PK__LOAD_EVER 60.0    /* whatever was lost: a process may have been stopped */
#define PK__LOAD_TRIAL 500e-6 /* of work that a trial takes, or as many regions as there may be */
#define PK__LOAD_START 20e-6  /* that a region of a trial may take beside its work */
enum { PK__LOAD_TRIALS = 8 };

/* Independent tasks of a region; their number and what each does never depend on the threads:
 *
 *     pk__team team = pk__team_of(context, threads, tasks);
 *     PK__PARALLEL(team)
 *     for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team))
 *         ...                 pk__thread() < threads is the thread that has it
 *     pk__team_end(&team);
 *
 * No break from that loop. */
typedef struct pk__team {
    pk_context *context; /* whose regions are watched; NULL: nobody's */
    size_t tasks, next;  /* next: that no thread has taken */
    int threads;         /* that take tasks */
    int started;         /* threads of the region */
    double begin, work;  /* its time; processor seconds of all threads */
} pk__team;

#ifdef _OPENMP
static double pk__processor_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Goes on with one thread for a while. */
static void pk__load_rest(pk_context *context, double now, double loss)
{
    pk_load *load = &context->load;
    double rest = PK__LOAD_REST * loss;
    rest = rest > 2 * load->rest ? rest : 2 * load->rest; /* at most PK__LOAD_LONGEST */
    rest = rest > PK__LOAD_SHORTEST ? rest : PK__LOAD_SHORTEST;
    rest = rest < PK__LOAD_EVER ? rest : PK__LOAD_EVER;
    load->until = now + rest;
    load->rest = rest < PK__LOAD_LONGEST / 2 ? rest : PK__LOAD_LONGEST / 2;
    load->gain = load->work = 0;
    load->trusted = load->tries = 0;
    context->backed_off++;
}

/* Updates the load after a region of several threads. */
static void pk__load_watch(pk_context *context, double now, double wall, double work)
{
    pk_load *load = &context->load;
    const double gain = work - wall;
    if (load->trusted) {
        load->gain = load->gain + gain < PK__LOAD_CREDIT ? load->gain + gain : PK__LOAD_CREDIT;
        if (load->gain >= PK__LOAD_CREDIT)
            load->rest = 0;
        if (load->gain < -PK__LOAD_LOSS)
            pk__load_rest(context, now, -load->gain);
        return;
    }
    load->gain += gain;
    load->work += work;
    load->tries++;
    const int gained = load->gain >= 0.15 * load->work - load->tries * PK__LOAD_START;
    const int lost = load->gain < -PK__LOAD_LOSS, last = load->tries == PK__LOAD_TRIALS;
    if (!lost && !last && !(gained && load->work >= PK__LOAD_TRIAL))
        return;
    if (gained && !lost) {
        load->trusted = 1;
        load->gain = load->work = 0;
        load->tries = 0;
    } else {
        pk__load_rest(context, now, -load->gain);
    }
}

/* The number of threads for a region. */
static int pk__load_threads(pk_context *context, int threads, double now)
{
    pk_load *load = &context->load;
    const long process = (long)getpid();
    if (!load->process)
        load->process = process;
    /* The threads of a parent are not there after a fork, but OpenMP would wait for them. */
    if (load->process != process || now < load->until)
        return 1;
    return threads;
}
#endif

PK__PRIVATE pk__team pk__team_of(pk_context *context, int threads, size_t tasks)
{
    pk__team team = {context, tasks, 0, 1, 1, 0, 0};
#ifdef _OPENMP
    if (threads > 1 && tasks > 1)
        team.threads = (size_t)threads < tasks ? threads : (int)tasks;
    if (team.threads > 1 && context) {
        team.begin = pk__seconds();
        team.threads = pk__load_threads(context, team.threads, team.begin);
    }
    team.started = team.threads;
    if (team.threads > 1 && context) {
        context->regions++;
        if (!context->load.trusted && team.threads >= omp_get_num_procs())
            team.started = team.threads + 1;
    }
#else
    (void)threads;
#endif
    return team;
}

PK__PRIVATE void pk__team_end(pk__team *team)
{
#ifdef _OPENMP
    if (team->context && team->started > 1) {
        const double now = pk__seconds();
        pk__load_watch(team->context, now, now - team->begin, team->work);
    }
#else
    (void)team;
#endif
}

PK__PRIVATE size_t pk__next_task(pk__team *team)
{
    size_t task;
    PK__ATOMIC_TAKE
    task = team->next++;
#ifdef _OPENMP
    if (task >= team->tasks && team->context && team->started > 1) {
        const double now = pk__processor_seconds();
        PK__ATOMIC_ADD
        team->work += now;
    }
#endif
    return task;
}

PK__PRIVATE size_t pk__first_task(pk__team *team)
{
#ifdef _OPENMP
    if (omp_get_thread_num() >= team->threads)
        return SIZE_MAX;
    if (team->context && team->started > 1) {
        const double now = pk__processor_seconds();
        PK__ATOMIC_ADD
        team->work -= now;
    }
#endif
    return pk__next_task(team);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
