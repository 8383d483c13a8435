/* fuzz_targets.h: the fuzz targets by name. */
#ifndef FUZZ_TARGETS_H
#define FUZZ_TARGETS_H
#include "fuzz_array.c"
#include "fuzz_execute.c"
#include "fuzz_folder.c"
#include "fuzz_manifest.c"
#include "fuzz_network.c"
#include "fuzz_program.c" /* the last: it includes the program */

typedef struct fuzz_target {
    const char *name;
    int (*run)(const uint8_t *data, size_t size);
} fuzz_target;

static const fuzz_target fuzz_targets[] = {
    {"array", fuzz_array},       {"execute", fuzz_execute}, {"folder", fuzz_folder_target},
    {"manifest", fuzz_manifest}, {"network", fuzz_network}, {"program", fuzz_program},
};
#define FUZZ_TARGETS (sizeof fuzz_targets / sizeof *fuzz_targets)

#endif
