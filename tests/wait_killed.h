/* wait_killed.h: waits for a child that may have been killed, and removes what its OpenMP runtime then leaves behind. LLVM's
 * keeps one page of shared memory for each process, which only a regular end removes: thousands of kills fill a small
 * /dev/shm, and a program that touches a file there that has no room left dies of SIGBUS. */
#ifndef WAIT_KILLED_H
#define WAIT_KILLED_H
#include <stdio.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

/* As waitpid without options. */
static inline pid_t wait_killed(pid_t child, int *status)
{
    char left[80];
    const pid_t ended = waitpid(child, status, 0);
    snprintf(left, sizeof left, "/dev/shm/__KMP_REGISTERED_LIB_%ld_%ld", (long)child, (long)getuid());
    (void)unlink(left);
    return ended;
}
#endif
