/* Fuzz target over the readers of array.h and dataset.h. The first byte of the input chooses: .npy (whole
 * or partial), IDX (images, then labels, cut where the second byte says) or CSV (with a number of target
 * columns). What is accepted is read through, so that a size that the file does not hold is an error of the
 * sanitizer.
 */
#include "fuzz.h"

static void fuzz_read_through(const pk_array *array)
{
    pk_real item;
    for (size_t i = 0; i < pk_array_items(array); i++)
        pk_array_reals(array, i, 1, &item);
}

static int fuzz_array(const uint8_t *input, size_t size)
{
    pk_context context;
    pk_dataset dataset;
    memset(&context, 0, sizeof context);
    context.memory_limit = (size_t)1 << 26;
    if (size < 2)
        return 0;
    int choice = input[0] % 4, option = input[1];
    pk_status status = PK_OK;
    /* A copy of its own size: aligned as a mapping is, and guarded by the sanitizer. */
    unsigned char *bytes = NULL;
    size -= 2;
    FUZZ_REQUIRE(posix_memalign((void **)&bytes, 64, size ? size : 1) == 0);
    memcpy(bytes, input + 2, size);
    if (choice < 2) {
        pk_array array;
        size_t offset = 0;
        status = pk__npy_parse(&context, "npy", bytes, size, choice ? PK_ARRAY_PARTIAL : 0, &array, &offset);
        if (status == PK_OK) {
            FUZZ_REQUIRE(offset <= size && pk_array_items(&array) * pk_type_size(array.type) <= size - offset);
            FUZZ_REQUIRE(choice || pk_array_items(&array) * pk_type_size(array.type) + offset == size);
            FUZZ_REQUIRE(array.extra_bytes == 0 || choice);
            if (offset % pk_type_size(array.type) == 0 && array.row_items) {
                array.data = bytes + offset;
                fuzz_read_through(&array);
            }
        }
    } else {
        if (choice == 2) {
            size_t cut = size * (size_t)option / 255;
            pk__file files[2];
            files[0].bytes = bytes;
            files[0].size = cut;
            files[1].bytes = bytes + cut;
            files[1].size = size - cut;
            status = pk__idx_dataset(&context, "images", &files[0], "labels", &files[1], 1.0 / 255, &dataset);
        } else {
            status = pk__csv_dataset(&context, "csv", (const char *)bytes, size, option % 5, &dataset);
        }
        if (status == PK_OK) {
            FUZZ_REQUIRE(pk_array_length(&dataset.targets) == pk_dataset_examples(&dataset));
            fuzz_read_through(&dataset.inputs);
            fuzz_read_through(&dataset.targets);
            pk_status checked = pk_dataset_check(&context, &dataset, pk_dataset_width(&dataset), 10);
            FUZZ_REQUIRE(checked == PK_OK || checked == PK_SHAPE);
            pk_dataset_release(&context, &dataset);
        }
    }
    FUZZ_REQUIRE(status == PK_OK || context.message[0] != 0);
    FUZZ_REQUIRE(context.memory_used == 0);
    free(bytes);
    return 0;
}
