/* Arrays that several subcommands read. */
#include "program.h"
#include <math.h>
#include <string.h>

int read_matrix(pk_context *context, const char *option, const char *path, int lists, size_t *rows,
                size_t *cols, double **numbers, pk_type *type)
{
    pk_array array;
    char shape[200];
    memset(&array, 0, sizeof array);
    *numbers = NULL;
    if (pk_array_map(context, path, 0, &array) != PK_OK)
        return refuse("%s: %s", option, pk_message(context));
    int status = PROGRAM_GO_ON;
    const size_t count = array.rank ? array.shape[0] * array.row_items : 0;
    if (array.rank < (lists ? 1 : 2) || array.rank > 2 || !count)
        status = refuse("%s: %s has shape %s, wanted (rows, columns)%s", option, path,
                        shape_text(&array, shape), lists ? " or (rows,)" : "");
    if (status < 0) {
        *rows = array.shape[0];
        *cols = array.row_items;
        *type = array.type;
        const pk_status allocated = pk_allocate(context, count, sizeof **numbers, path, numbers);
        if (allocated)
            status = refuse("%s: %s", allocated == PK_MEMORY_LIMIT ? "--memory" : option, pk_message(context));
        else
            pk_array_doubles(&array, 0, count, *numbers);
    }
    for (size_t i = 0; i < count && status < 0; i++)
        if (!isfinite((*numbers)[i]))
            status = refuse("%s: %s: number %zu of row %zu is %s", option, path, i % *cols, i / *cols,
                            isnan((*numbers)[i]) ? "NaN" : "infinite");
    pk_array_release(context, &array);
    return status;
}
