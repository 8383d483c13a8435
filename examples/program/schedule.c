/* The text of --rate: a number, or NAME:NUMBER:..., or a file of rates; warmup:N: in front of any of them. */
#include "schedule.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUMBERS_MOST = 4 };

static void constant_schedule(const double *numbers, int count, size_t steps, pk_schedule *schedule)
{
    (void)count, (void)steps;
    schedule->rate = numbers[0];
}

static void cosine_schedule(const double *numbers, int count, size_t steps, pk_schedule *schedule)
{
    schedule->kind = PK_SCHEDULE_COSINE;
    schedule->rate = numbers[0];
    schedule->low = numbers[1];
    schedule->period = count > 2 ? (size_t)numbers[2] : steps;
}

static void step_schedule(const double *numbers, int count, size_t steps, pk_schedule *schedule)
{
    (void)count, (void)steps;
    schedule->kind = PK_SCHEDULE_STEP;
    schedule->rate = numbers[0];
    schedule->factor = numbers[1];
    schedule->period = (size_t)numbers[2];
}

static void triangular_schedule(const double *numbers, int count, size_t steps, pk_schedule *schedule)
{
    (void)steps;
    schedule->kind = PK_SCHEDULE_TRIANGULAR;
    schedule->low = numbers[0];
    schedule->rate = numbers[1];
    schedule->period = (size_t)numbers[2];
    schedule->period_down = count > 3 ? (size_t)numbers[3] : 0;
}

/* kinds: of the numbers, 'r' a rate or another number that is not negative, '+' one above 0, 'n' a whole number of steps. */
static const struct schedule_form {
    const char *name, *form, *kinds;
    int least; /* numbers */
    void (*fill)(const double *numbers, int count, size_t steps, pk_schedule *schedule);
} forms[] = {
    {"", "R", "r", 1, constant_schedule},
    {"cosine", "cosine:R0:R1[:PERIOD]", "rrn", 2, cosine_schedule},
    {"step", "step:R:FACTOR:EVERY", "r+n", 3, step_schedule},
    {"triangular", "triangular:LOW:HIGH:UP[:DOWN]", "rrnn", 3, triangular_schedule},
};
enum { FORMS = (int)(sizeof forms / sizeof *forms) };

const char *schedule_forms(size_t index)
{
    static const char *const others[] = {"warmup:N:SCHEDULE", "RATES.npy"};
    return index < FORMS ? forms[index].form : index < FORMS + 2 ? others[index - FORMS] : NULL;
}

/* A number that ends at a colon or at the end of the text. */
static int read_number(const char *text, char kind, double *number, const char **end)
{
    char *stop = NULL;
    if (!((*text >= '0' && *text <= '9') || *text == '.') || text[strspn(text, "0")] == 'x')
        return 0;
    *number = strtod(text, &stop);
    *end = stop;
    if ((*stop && *stop != ':') || !isfinite(*number))
        return 0;
    return kind == 'n' ? *number >= 1 && *number <= 1e15 && *number == floor(*number)
                       : kind == 'r' || *number > 0;
}

/* NUMBER:NUMBER ... of a form. */
static int read_form(const struct schedule_form *form, const char *text, size_t steps, pk_schedule *schedule)
{
    double numbers[NUMBERS_MOST];
    int count = 0;
    for (;; text++) {
        if (!form->kinds[count] || !read_number(text, form->kinds[count], &numbers[count], &text))
            return 0;
        count++;
        if (!*text)
            break;
    }
    if (count < form->least)
        return 0;
    form->fill(numbers, count, steps, schedule);
    return 1;
}

static int read_rates(pk_context *context, const char *path, size_t steps, pk_schedule *schedule,
                      pk_array *rates, char problem[400])
{
    char shape[200];
    if (pk_array_map(context, path, 0, rates) != PK_OK) {
        snprintf(problem, 400, "%.390s", pk_message(context));
        return 0;
    }
    if (rates->rank != 1 || rates->shape[0] != steps || rates->type != PK_FLOAT64) {
        snprintf(problem, 400, "%.100s has shape %.100s and type %s; %zu steps need (%zu,) of float64", path,
                 shape_text(rates, shape), pk_type_name(rates->type), steps, steps);
        return 0;
    }
    schedule->kind = PK_SCHEDULE_ARRAY;
    schedule->rates = (const double *)rates->data;
    schedule->rates_count = steps;
    return 1;
}

static void list_forms(const char *text, char problem[400])
{
    const char *form;
    size_t used = (size_t)snprintf(problem, 400, "'%.80s' is not a schedule; these are: ", text);
    for (size_t i = 0; (form = schedule_forms(i)) != NULL && used < 400; i++)
        used += (size_t)snprintf(problem + used, 400 - used, "%s%s", i ? ", " : "", form);
}

int schedule_read(pk_context *context, const char *text, size_t steps, pk_schedule *schedule, pk_array *rates,
                  char problem[400])
{
    const char *whole = text;
    double warmup = 0;
    memset(schedule, 0, sizeof *schedule);
    if (strncmp(text, "warmup:", 7) == 0) {
        if (!read_number(text + 7, 'n', &warmup, &text) || !*text) {
            list_forms(whole, problem);
            return 0;
        }
        text++;
    }
    const size_t length = strlen(text), name = strcspn(text, ":");
    int found = 0;
    if (length > 4 && strcmp(text + length - 4, ".npy") == 0) {
        if (!read_rates(context, text, steps, schedule, rates, problem))
            return 0;
        found = 1;
    }
    for (int i = 0; i < FORMS && !found; i++) {
        const int named = *forms[i].name != 0;
        if (!named || (strlen(forms[i].name) == name && strncmp(forms[i].name, text, name) == 0 && text[name]))
            found = read_form(&forms[i], text + (named ? name + 1 : 0), steps, schedule);
    }
    schedule->warmup = (size_t)warmup;
    if (!found)
        list_forms(whole, problem);
    else if (pk_schedule_check(context, schedule, steps) != PK_OK) {
        snprintf(problem, 400, "%.390s", pk_message(context));
        found = 0;
    }
    return found;
}
