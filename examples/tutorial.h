/* Helpers of the tutorials and studies that have nothing to do with pathkernel itself: finding the digits, a folder for the
 * outputs, calling gnuplot. Include it after pathkernel.h. */
#ifndef TUTORIAL_H
#define TUTORIAL_H
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Every call of the library returns a status; after an error the context holds the sentence that tells what
 * went wrong. For functions that return 0 for success, where a pk_context *context is in sight. */
#define TRY(call)        \
    if ((call) != PK_OK) \
    return fprintf(stderr, "%s\n", pk_message(context)), 1

enum { TUTORIAL_PATH = 1200 };

/* data/ beside the source file, or the folder given. Pixels become 0 .. 1. */
static inline int tutorial_digits(pk_context *context, const char *folder, const char *source,
                                  pk_dataset *digits)
{
    char images[TUTORIAL_PATH], labels[TUTORIAL_PATH], data[TUTORIAL_PATH - 100];
    const char *slash = strrchr(source, '/');
    if (folder)
        snprintf(data, sizeof data, "%s", folder);
    else
        snprintf(data, sizeof data, "%.*sdata", slash ? (int)(slash + 1 - source) : 0, source);
    snprintf(images, sizeof images, "%s/digits-images-idx3-ubyte", data);
    snprintf(labels, sizeof labels, "%s/digits-labels-idx1-ubyte", data);
    if (pk_dataset_idx(context, images, labels, 1 / 16.0, digits) == PK_OK)
        return 0;
    fprintf(stderr, "%s\nThe folder with the digits is the last argument, examples/data by default.\n",
            pk_message(context));
    return 1;
}

/* path = output/name, a folder for a run. */
static inline int tutorial_folder(const char *output, const char *name, char path[TUTORIAL_PATH])
{
    int length = snprintf(path, TUTORIAL_PATH, "%s/%s", output, name);
    mkdir(output, 0777);
    errno = ENAMETOOLONG;
    if (length >= TUTORIAL_PATH || (mkdir(path, 0777) && access(path, W_OK))) {
        perror(path);
        return 1;
    }
    return 0;
}

/* A file for writing in a folder. */
static inline FILE *tutorial_create(const char *folder, const char *name)
{
    char path[TUTORIAL_PATH + 100];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    if (!file)
        perror(path);
    return file;
}

/* The index of the largest of count numbers: a network's decision. */
static inline size_t tutorial_largest(const double *values, size_t count)
{
    size_t largest = 0;
    for (size_t k = 1; k < count; k++)
        largest = values[k] > values[largest] ? k : largest;
    return largest;
}

/* Draws with a gnuplot script beside the source file; folder is the script's variable of that name. */
static inline int tutorial_plot(const char *source, const char *script, const char *folder,
                                const char *settings)
{
    const char *slash = strrchr(source, '/');
    if (system("gnuplot --version >/dev/null 2>&1")) {
        printf("No pictures: gnuplot is not installed (Debian: gnuplot-nox). The numbers are in %s.\n", folder);
        return 0;
    }
    FILE *gnuplot = popen("gnuplot", "w");
    if (!gnuplot) {
        perror("gnuplot");
        return 1;
    }
    fputs("folder = '", gnuplot);
    for (const char *c = folder; *c; c++)
        fprintf(gnuplot, *c == '\'' ? "\'\'" : "%c", *c);
    fprintf(gnuplot, "'\n%s\nload \"%.*s%s\"\n", settings, slash ? (int)(slash + 1 - source) : 0, source,
            script);
    if (pclose(gnuplot)) {
        fprintf(stderr, "gnuplot could not draw %s\n", script);
        return 1;
    }
    return 0;
}

#endif
