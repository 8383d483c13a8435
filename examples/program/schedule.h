/* The learning rate of each step, from the text of --rate. */
#ifndef PATHKERNEL_PROGRAM_SCHEDULE_H
#define PATHKERNEL_PROGRAM_SCHEDULE_H
#include "program.h"

/* A schedule of `steps` steps. rates: the file that it may come from, released by the caller after use. 0, and what is
 * wrong in problem. */
int schedule_read(pk_context *context, const char *text, size_t steps, pk_schedule *schedule, pk_array *rates,
                  char problem[400]);

/* The forms that there are, one by one; NULL behind the last one. */
const char *schedule_forms(size_t index);

#endif
