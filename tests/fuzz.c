/* All fuzz targets in one program of libFuzzer; PATHKERNEL_FUZZ_TARGET in the environment names the one that runs. */
#include "fuzz.h"
#include "fuzz_targets.h"

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const fuzz_target *fuzz_chosen;

int LLVMFuzzerInitialize(int *count, char ***arguments)
{
    const char *name = getenv("PATHKERNEL_FUZZ_TARGET");
    (void)count, (void)arguments;
    for (size_t i = 0; i < FUZZ_TARGETS; i++)
        if (name && strcmp(name, fuzz_targets[i].name) == 0)
            fuzz_chosen = &fuzz_targets[i];
    if (!fuzz_chosen) {
        fprintf(stderr, "PATHKERNEL_FUZZ_TARGET must be one of:");
        for (size_t i = 0; i < FUZZ_TARGETS; i++)
            fprintf(stderr, " %s", fuzz_targets[i].name);
        fprintf(stderr, "\n");
        exit(2);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    return fuzz_chosen->run(data, size);
}
