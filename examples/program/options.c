/* The arguments of a subcommand, read from its table of options; --help is printed from the same table. */
#include "program.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS_MOST = 1024 };

/* ---- values -------------------------------------------------------------------------------------------- */

int parse_size(const char *text, size_t *number)
{
    char *end = NULL;
    errno = 0;
    if (*text < '0' || *text > '9')
        return 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno || *end || value > SIZE_MAX)
        return 0;
    *number = (size_t)value;
    return 1;
}

int parse_text(pk_context *context, const char *text, void *place)
{
    (void)context;
    *(const char **)place = text;
    return 1;
}

int parse_flag(pk_context *context, const char *text, void *place)
{
    (void)context, (void)text;
    *(int *)place = 1;
    return 1;
}

int parse_whole(pk_context *context, const char *text, void *place)
{
    (void)context;
    return parse_size(text, (size_t *)place);
}

int parse_positive_whole(pk_context *context, const char *text, void *place)
{
    size_t number = 0;
    (void)context;
    if (!parse_size(text, &number) || !number)
        return 0;
    *(size_t *)place = number;
    return 1;
}

int parse_positive(pk_context *context, const char *text, void *place)
{
    char *end = NULL;
    double number = strtod(text, &end);
    (void)context;
    if (end == text || *end || !(number > 0) || !isfinite(number))
        return 0;
    *(double *)place = number;
    return 1;
}

int parse_not_negative(pk_context *context, const char *text, void *place)
{
    if (parse_positive(context, text, place))
        return 1;
    char *end = NULL;
    const double number = strtod(text, &end);
    *(double *)place = 0;
    return end != text && !*end && number == 0;
}

/* 512K, 64M, 2G, 1T (powers of 1024), 1.5G, or plain bytes. */
int parse_memory(pk_context *context, const char *text, void *place)
{
    char *end = NULL;
    (void)context;
    if (!((*text >= '0' && *text <= '9') || *text == '.') || text[strspn(text, "0123456789.")] == 'x')
        return 0;
    double value = strtod(text, &end);
    const char *units = "KMGT", *unit = *end ? strchr(units, *end >= 'a' ? *end - 'a' + 'A' : *end) : NULL;
    if (unit) {
        value *= ldexp(1, 10 * (int)(unit - units + 1));
        end++;
        end += end[0] == 'i' && end[1] == 'B' ? 2 : end[0] == 'B';
    }
    if (*end || !(value >= 1) || value > 9e18 || value > (double)SIZE_MAX / 2)
        return 0;
    *(size_t *)place = (size_t)value;
    return 1;
}

int parse_threads(pk_context *context, const char *text, void *place)
{
    size_t number = 0;
    (void)context;
    if (!parse_size(text, &number) || number < 1 || number > THREADS_MOST)
        return 0;
    *(int *)place = (int)number;
    return 1;
}

int parse_rule(pk_context *context, const char *text, void *place)
{
    return pk_quadrature_parse(context, text, (pk_quadrature *)place) == PK_OK;
}

const char *rule_names(size_t index)
{
    return index < 1000 ? pk_rule_name((pk_rule)index) : NULL;
}

/* ---- words that are nearly right ----------------------------------------------------------------------- */

/* How many letters have to be changed, added, left out or swapped with the next one; 99 for long words. */
static size_t word_distance(const char *a, const char *b)
{
    enum { LONGEST = 40 };
    size_t rows[3][LONGEST + 1];
    const size_t length = strlen(a), other = strlen(b);
    if (length > LONGEST || other > LONGEST)
        return 99;
    for (size_t i = 0; i <= length; i++)
        rows[0][i] = i;
    for (size_t j = 1; j <= other; j++) {
        size_t *row = rows[j % 3], *last = rows[(j + 2) % 3], *before = rows[(j + 1) % 3];
        row[0] = j;
        for (size_t i = 1; i <= length; i++) {
            size_t best = last[i - 1] + (a[i - 1] != b[j - 1]);
            best = best < last[i] + 1 ? best : last[i] + 1;
            best = best < row[i - 1] + 1 ? best : row[i - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before[i - 2] + 1 < best)
                best = before[i - 2] + 1;
            row[i] = best;
        }
    }
    return rows[other % 3][length];
}

const char *nearest_word(const char *word, size_t count, const char *const *words)
{
    const char *nearest = NULL;
    size_t best = strlen(word) / 3 + 1; /* a third of the letters may be wrong */
    for (size_t i = 0; i < count; i++) {
        const size_t distance = word_distance(word, words[i]);
        const size_t start = strlen(word) > 3 && strncmp(word, words[i], strlen(word)) == 0; /* cut short */
        if (distance < best || (start && !nearest)) {
            best = distance < best ? distance : best;
            nearest = words[i];
        }
    }
    return nearest;
}

/* ---- help ---------------------------------------------------------------------------------------------- */

static int option_count(const program_command *command)
{
    int count = 0;
    while (command->options[count].name)
        count++;
    return count;
}

enum { HELP_COLUMN = 26, HELP_WIDTH = 110 };

/* A new line of the right column, where what follows does not fit. */
static size_t help_break(size_t column, size_t length)
{
    if (column + length <= HELP_WIDTH)
        return column;
    printf("\n%*s", HELP_COLUMN, "");
    return HELP_COLUMN;
}

static void print_names(const program_option *option)
{
    const char *name;
    size_t column = (size_t)printf("\n%*sknown: ", HELP_COLUMN, "") - 1;
    for (size_t i = 0; (name = option->names(i)) != NULL; i++) {
        column += (size_t)printf("%s", i ? "," : "");
        const size_t before = column;
        column = help_break(column, strlen(name) + 2);
        column += (size_t)printf("%s%s", i && column == before ? " " : "", name);
    }
}

static void print_option(const program_option *option)
{
    char left[80];
    size_t column = (size_t)snprintf(left, sizeof left, "  %s%s%s", option->name, option->value ? " " : "",
                                     option->value ? option->value : "");
    printf("%s", left);
    if (column + 2 > HELP_COLUMN) {
        printf("\n");
        column = 0;
    }
    printf("%*s", (int)(HELP_COLUMN - column), "");
    for (const char *at = option->help; *at; at++) {
        putchar(*at);
        if (*at == '\n')
            printf("%*s", HELP_COLUMN, "");
    }
    if (option->names)
        print_names(option);
    printf("\n");
}

static int print_help(const program_command *command)
{
    printf("usage: %s%s%s", program_name, command->argument ? " " : "",
           command->argument ? command->argument : "");
    for (const program_option *option = command->options; option->name; option++)
        if (option->required)
            printf(" %s %s", option->name, option->value);
    printf(" [options]\n\n%s\n", command->summary);
    if (command->about)
        printf("%s\n", command->about);
    printf("\n");
    for (const program_option *option = command->options; option->name; option++)
        print_option(option);
    printf("  --help, --version\n");
    if (command->after)
        printf("\n%s\n", command->after);
    return fflush(stdout) != 0 || ferror(stdout) ? PROGRAM_FAILED : PROGRAM_DONE;
}

static int print_version(void)
{
    return printf("%s %s\n", program_name, pk_version()) < 0 || fflush(stdout) != 0 ? PROGRAM_FAILED
                                                                                    : PROGRAM_DONE;
}

/* ---- reading ------------------------------------------------------------------------------------------- */

static int refuse_option(const program_command *command, const char *argument)
{
    const char *words[64], *nearest;
    char name[80];
    const int count = option_count(command);
    for (int i = 0; i < count && i < 64; i++)
        words[i] = command->options[i].name;
    snprintf(name, sizeof name, "%.*s", (int)strcspn(argument, "="), argument);
    nearest = nearest_word(name, (size_t)count, words);
    return refuse("unknown option '%s'%s%s%s; --help lists them", argument, nearest ? " (is it " : "",
                  nearest ? nearest : "", nearest ? "?)" : "");
}

/* A value that is not what is wanted, and what would be. */
static int refuse_value(const program_option *option, const char *value, const char *message)
{
    char known[600] = "";
    const char *name;
    size_t used = 0;
    if (!option->wanted)
        return refuse("%s: %s", option->name, message);
    for (size_t i = 0; option->names && (name = option->names(i)) != NULL && used < sizeof known; i++)
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "; known are: ", name);
    return refuse("%s: '%s' is not %s%s", option->name, value, option->wanted, known);
}

/* Reads arguments[*at], and what follows it where that is its value. */
static int read_option(const program_command *command, int count, char **arguments, int *at, void *settings,
                       uint64_t *given)
{
    const char *argument = arguments[*at], *value = NULL;
    const int length = (int)strcspn(argument, "=");
    int i = 0;
    while (command->options[i].name && (strlen(command->options[i].name) != (size_t)length ||
                                        strncmp(command->options[i].name, argument, (size_t)length) != 0))
        i++;
    const program_option *option = &command->options[i];
    if (!option->name)
        return refuse_option(command, argument);
    if (argument[length] && !option->value)
        return refuse("%s takes no value", option->name);
    if (argument[length])
        value = argument + length + 1;
    else if (option->value && *at + 1 < count && arguments[*at + 1]) {
        value = arguments[++*at];
        if (strncmp(value, "--", 2) == 0) /* the next option; --out=--name is for such a name */
            value = NULL;
    }
    if (option->value && (!value || !*value))
        return refuse("%s needs a value; --help tells which", option->name);
    pk_context context;
    memset(&context, 0, sizeof context);
    if (!option->parse(&context, value, (char *)settings + option->place))
        return refuse_value(option, value, pk_message(&context));
    *given |= (uint64_t)1 << i;
    return PROGRAM_GO_ON;
}

int options_given(const program_command *command, uint64_t given, const char *name)
{
    for (int i = 0; command->options[i].name; i++)
        if (strcmp(command->options[i].name, name) == 0)
            return (int)(given >> i & 1);
    return 0;
}

int options_parse(const program_command *command, int count, char **arguments, void *settings, uint64_t *given)
{
    const char **place = (const char **)settings;
    int only_names = 0, status = PROGRAM_GO_ON;
    *given = 0;
    for (int i = 0; i < count && status == PROGRAM_GO_ON; i++) {
        const char *argument = arguments[i];
        if (only_names || argument[0] != '-' || !argument[1]) {
            if (!command->argument)
                return refuse("'%s': %s takes options only; --help lists them", argument, command->name);
            if (*place)
                return refuse("'%s': only one %s is taken, and that is '%s'", argument, command->what, *place);
            *place = argument;
        } else if (strcmp(argument, "--") == 0) {
            only_names = 1;
        } else if (strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0) {
            return print_help(command);
        } else if (strcmp(argument, "--version") == 0) {
            return print_version();
        } else {
            status = read_option(command, count, arguments, &i, settings, given);
        }
    }
    if (status != PROGRAM_GO_ON)
        return status;
    if (command->argument && !*place)
        return refuse("no %s is given; --help tells how", command->what);
    for (int i = 0; command->options[i].name; i++)
        if (command->options[i].required && !(*given >> i & 1))
            return refuse("%s %s is missing; --help tells how", command->options[i].name,
                          command->options[i].value);
    return PROGRAM_GO_ON;
}
