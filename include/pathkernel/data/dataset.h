/* pathkernel/data/dataset.h: examples with their targets: checked, gathered, read from IDX and CSV files. */
#ifndef PATHKERNEL_DATASET_H
#define PATHKERNEL_DATASET_H
#include "array.h"

/* >>> declarations */
PK__BEGIN_C

/* Examples: inputs (N, D...), targets (N,) labels, or (N,) or (N, C) numbers. (N,) integers or bools are labels; any other
 * array holds numbers. */
typedef struct pk_dataset {
    pk_array inputs, targets;
} pk_dataset;

/* N, and the product of D... */
PK_API size_t pk_dataset_examples(const pk_dataset *dataset);
PK_API size_t pk_dataset_width(const pk_dataset *dataset);

/* Whether the data fit a network of input_width inputs and outputs outputs: at least one example, as many
 * targets as inputs, all numbers finite as pk_real. Reads all floats; O(N (D + C)). What the numbers mean,
 * also the range of labels, is the loss's: pk_loss_check.
 * PK_SHAPE, PK_NOT_FINITE, PK_ARGUMENT; messages name the row. */
PK_API PK__MUST_USE pk_status pk_dataset_check(pk_context *context, const pk_dataset *dataset,
                                               size_t input_width, size_t outputs);

/* rows (count x width) = the inputs of items[0 .. count - 1], which must be in range. Any thread. */
PK_API void pk_dataset_inputs(const pk_dataset *dataset, const int64_t *items, size_t count, pk_real *rows);

/* Two IDX files of unsigned bytes (MNIST's format, unpacked) -> inputs (N, H, W) float64 = scale * byte,
 * targets (N,) int64. Owns its memory. PK_IO, PK_FORMAT, PK_UNSUPPORTED, PK_SHAPE (N differs), PK_MEMORY... */
PK_API PK__MUST_USE pk_status pk_dataset_idx(pk_context *context, const char *images_path,
                                             const char *labels_path, double scale, pk_dataset *dataset);

/* A table of finite decimal numbers: comma-separated, one example a line, LF or CRLF. The last target_columns
 * columns become float64 targets, (N,) or (N, target_columns); with 0 the last column is an integer label.
 * A first line without any number is a header. Independent of the locale. Anything else (ragged lines, empty
 * lines but at the end, text) is PK_FORMAT with line and column. Owns its memory. */
PK_API PK__MUST_USE pk_status pk_dataset_csv(pk_context *context, const char *path, int target_columns,
                                             pk_dataset *dataset);

/* *rows = a view of count consecutive examples from first on. PK_SHAPE where they do not exist. */
PK_API PK__MUST_USE pk_status pk_dataset_rows(pk_context *context, const pk_dataset *dataset, size_t first,
                                              size_t count, pk_dataset *rows);

PK_API void pk_dataset_release(pk_context *context, pk_dataset *dataset);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_DATASET_IMPLEMENTED)
#define PATHKERNEL_DATASET_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- examples ---- */

PK_API size_t pk_dataset_examples(const pk_dataset *dataset)
{
    return pk_array_length(&dataset->inputs);
}

PK_API size_t pk_dataset_width(const pk_dataset *dataset)
{
    return dataset->inputs.row_items;
}

PK_API void pk_dataset_inputs(const pk_dataset *dataset, const int64_t *items, size_t count, pk_real *rows)
{
    size_t width = dataset->inputs.row_items;
    for (size_t i = 0; i < count; i++)
        pk_array_reals(&dataset->inputs, (size_t)items[i] * width, width, rows + i * width);
}

/* Whether the targets are one integer for each example: a class, or the number that a single output is to give. */
PK__PRIVATE int pk__is_labels(const pk_array *targets)
{
    return targets->rank == 1 && pk_type_is_integer(targets->type);
}

/* Whether targets have the shape of labels or of as many numbers as there are outputs. A column of integers could be
 * either, and is neither. */
PK__PRIVATE int pk__fit_outputs(const pk_array *targets, size_t outputs)
{
    const int column = targets->rank == 2 && targets->shape[1] == 1 && pk_type_is_integer(targets->type);
    return pk__is_labels(targets) || (targets->rank <= 2 && targets->row_items == outputs && !column);
}

/* The label of a row. */
PK__PRIVATE int64_t pk__label(const pk_array *targets, size_t row)
{
    int64_t label = 0;
    if (targets->type == PK_INT64)
        return ((const int64_t *)targets->data)[row];
    pk_array_integers(targets, row, 1, &label);
    return label;
}

/* The index of the first item that is no finite pk_real; the number of items where all are. */
static size_t pk__first_not_finite(const pk_array *array)
{
    enum { BLOCK = 4096 };
    const double *doubles = (const double *)array->data;
    const float *floats = (const float *)array->data;
    size_t items = pk_array_items(array), i, start;
    if (array->type != PK_FLOAT64 && array->type != PK_FLOAT32)
        return items;
    for (start = 0; start < items; start += BLOCK) {
        size_t end = pk__min(items, start + BLOCK);
        int bad = 0; /* without an exit in the loops, they become vectors */
        if (array->type == PK_FLOAT64)
            for (i = start; i < end; i++)
                bad |= !pk__finite((double)(pk_real)doubles[i]);
        else
            for (i = start; i < end; i++)
                bad |= !pk__finite((double)floats[i]);
        for (i = start; bad && i < end; i++)
            if (!pk__finite(array->type == PK_FLOAT64 ? (double)(pk_real)doubles[i] : (double)floats[i]))
                return i;
    }
    return items;
}

static pk_status pk__check_finite(pk_context *context, const char *name, const pk_array *array)
{
    size_t i = pk__first_not_finite(array);
    return i == pk_array_items(array)
               ? PK_OK
               : pk__fail(context, PK_NOT_FINITE, "%s: row %zu, number %zu is not finite", name,
                          i / array->row_items, i % array->row_items);
}

/* Whether targets have one row for each input and as many finite numbers in it as a network has outputs. */
PK__PRIVATE pk_status pk__dataset_check_targets(pk_context *context, const pk_dataset *dataset, size_t outputs)
{
    char has[200], also[200];
    if (!dataset || !dataset->inputs.type || !dataset->targets.type)
        return pk__fail(context, PK_ARGUMENT, "a data set has no inputs or no targets");
    const pk_array *inputs = &dataset->inputs, *targets = &dataset->targets;
    size_t examples = pk_array_length(inputs);
    pk__shape_text(inputs, has, sizeof has);
    pk__shape_text(targets, also, sizeof also);
    if (!inputs->rank || !targets->rank || pk_array_length(targets) != examples)
        return pk__fail(context, PK_SHAPE, "inputs %s and targets %s: not one target row for each input row",
                        has, also);
    if (!pk__fit_outputs(targets, outputs))
        return pk__fail(
            context, PK_SHAPE,
            "targets %s %s: the network's %zu outputs take (%zu,) integer labels or (%zu, %zu) numbers", also,
            pk_type_name(targets->type), outputs, examples, examples, outputs);
    if (pk_array_items(targets) && !targets->data)
        return pk__fail(context, PK_ARGUMENT, "targets %s: the data are NULL", also);
    return pk__check_finite(context, "targets", targets);
}

PK__PRIVATE pk_status pk__dataset_check_inputs(pk_context *context, const pk_dataset *dataset,
                                               size_t input_width)
{
    char has[200];
    const pk_array *inputs = &dataset->inputs;
    pk__shape_text(inputs, has, sizeof has);
    if (!pk_array_length(inputs))
        return pk__fail(context, PK_SHAPE, "inputs %s: no examples", has);
    if (inputs->row_items != input_width)
        return pk__fail(context, PK_SHAPE, "inputs %s: %zu numbers an example, the network takes %zu", has,
                        inputs->row_items, input_width);
    if (pk_array_items(inputs) && !inputs->data)
        return pk__fail(context, PK_ARGUMENT, "inputs %s: the data are NULL", has);
    return pk__check_finite(context, "inputs", inputs);
}

PK_API pk_status pk_dataset_check(pk_context *context, const pk_dataset *dataset, size_t input_width,
                                  size_t outputs)
{
    pk_status status = pk__dataset_check_targets(context, dataset, outputs);
    return status ? status : pk__dataset_check_inputs(context, dataset, input_width);
}

PK_API pk_status pk_dataset_rows(pk_context *context, const pk_dataset *dataset, size_t first, size_t count,
                                 pk_dataset *rows)
{
    if (!dataset || !rows)
        return pk__fail(context, PK_ARGUMENT, "pk_dataset_rows: a data set is NULL");
    const pk_array *inputs = &dataset->inputs, *targets = &dataset->targets;
    size_t examples = pk_array_length(inputs);
    if (!inputs->rank || !targets->rank || pk_array_length(targets) != examples || first > examples ||
        count > examples - first)
        return pk__fail(context, PK_SHAPE, "rows %zu .. +%zu of a data set of %zu examples", first, count,
                        examples);
    pk_dataset view;
    view.inputs = pk_array_rows(inputs, first, count);
    view.targets = pk_array_rows(targets, first, count);
    *rows = view;
    return PK_OK;
}

PK_API void pk_dataset_release(pk_context *context, pk_dataset *dataset)
{
    if (!dataset)
        return;
    pk_array_release(context, &dataset->inputs);
    pk_array_release(context, &dataset->targets);
}

/* A data set's memory: inputs of the shape (shape[0], shape[1], ...), targets (shape[0],) or with columns. */
static pk_status pk__dataset_allocate(pk_context *context, int rank, const size_t *shape, pk_type target_type,
                                      size_t target_columns, pk_dataset *dataset)
{
    size_t target_shape[2] = {shape[0], target_columns}, bytes = 0;
    pk_dataset made;
    memset(&made, 0, sizeof made);
    made.inputs = pk_array_view(PK_FLOAT64, rank, shape, NULL);
    made.targets = pk_array_view(target_type, target_columns > 1 ? 2 : 1, target_shape, NULL);
    if (!made.inputs.type || !made.targets.type || !pk__array_measure(&made.inputs, &bytes))
        return pk__fail(context, PK_OVERFLOW, "a data set of %zu examples overflows", shape[0]);
    pk_status status = pk_allocate(context, bytes, 1, "the inputs of a data set", &made.inputs.owned);
    if (!status)
        status = pk_allocate(context, pk_array_items(&made.targets), 8, "the targets of a data set",
                             &made.targets.owned);
    if (status) {
        pk_release(context, made.inputs.owned);
        return status;
    }
    made.inputs.data = made.inputs.owned;
    made.targets.data = made.targets.owned;
    *dataset = made;
    return PK_OK;
}

/* ---- IDX ---- */

/* A view of the bytes of an IDX file: 0, 0, type, rank, then big-endian 32-bit dimensions, then the items. */
static pk_status pk__idx_parse(pk_context *context, const char *name, const unsigned char *bytes, size_t size,
                               pk_array *array)
{
    if (size < 4 || bytes[0] || bytes[1])
        return pk__fail(context, PK_FORMAT, "%s: is not an IDX file%s", name,
                        size > 1 && bytes[0] == 0x1f && bytes[1] == 0x8b ? " but compressed by gzip; unpack it"
                                                                         : "");
    if (bytes[2] != 8)
        return pk__fail(context, PK_UNSUPPORTED,
                        "%s: IDX items of type 0x%02x; unsigned bytes (0x08) are supported", name, bytes[2]);
    int rank = bytes[3];
    size_t shape[PK_ARRAY_RANK], start = 4 + 4 * (size_t)rank;
    if (rank < 1 || rank > PK_ARRAY_RANK)
        return pk__fail(context, PK_UNSUPPORTED, "%s: %d dimensions; 1 to %d are supported", name, rank,
                        PK_ARRAY_RANK);
    if (size < start)
        return pk__fail(context, PK_FORMAT, "%s: the header is cut off: %zu bytes of %zu", name, size, start);
    for (int i = 0; i < rank; i++) {
        const unsigned char *at = bytes + 4 + 4 * i;
        shape[i] = (size_t)at[0] << 24 | (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3];
    }
    pk_array view = pk_array_view(PK_UINT8, rank, shape, bytes + start);
    if (!view.type)
        return pk__fail(context, PK_OVERFLOW, "%s: the header's shape overflows", name);
    if (pk_array_items(&view) != size - start) {
        char text[200];
        return pk__fail(context, PK_FORMAT, "%s: %s takes %zu bytes, the file holds %zu", name,
                        pk__shape_text(&view, text, sizeof text), pk_array_items(&view), size - start);
    }
    *array = view;
    return PK_OK;
}

/* pk_dataset_idx after its files are in memory. */
PK__PRIVATE pk_status pk__idx_dataset(pk_context *context, const char *images_name, const pk__file *images_file,
                                      const char *labels_name, const pk__file *labels_file, double scale,
                                      pk_dataset *dataset)
{
    pk_array images, labels;
    pk_status status = pk__idx_parse(context, images_name, images_file->bytes, images_file->size, &images);
    if (!status)
        status = pk__idx_parse(context, labels_name, labels_file->bytes, labels_file->size, &labels);
    if (status)
        return status;
    size_t examples = images.shape[0], items = pk_array_items(&images), i;
    if (labels.rank != 1 || labels.shape[0] != examples) {
        char text[200];
        return pk__fail(context, PK_SHAPE, "%s: labels %s for %zu images", labels_name,
                        pk__shape_text(&labels, text, sizeof text), examples);
    }
    pk_dataset made;
    status = pk__dataset_allocate(context, images.rank, images.shape, PK_INT64, 1, &made);
    if (status)
        return status;
    double *inputs = (double *)made.inputs.owned;
    int64_t *targets = (int64_t *)made.targets.owned;
    for (i = 0; i < items; i++)
        inputs[i] = scale * ((const unsigned char *)images.data)[i];
    for (i = 0; i < examples; i++)
        targets[i] = ((const unsigned char *)labels.data)[i];
    *dataset = made;
    return PK_OK;
}

PK_API pk_status pk_dataset_idx(pk_context *context, const char *images_path, const char *labels_path,
                                double scale, pk_dataset *dataset)
{
    pk__file images = {NULL, 0}, labels = {NULL, 0};
    if (!images_path || !labels_path || !dataset || !pk__finite(scale))
        return pk__fail(context, PK_ARGUMENT,
                        "pk_dataset_idx: a pointer is NULL, or the scale %g is not finite", scale);
    pk_status status = pk__file_map(context, images_path, &images);
    if (!status)
        status = pk__file_map(context, labels_path, &labels);
    if (!status)
        status = pk__idx_dataset(context, pk__name(images_path), &images, pk__name(labels_path), &labels, scale,
                                 dataset);
    pk__file_unmap(&images);
    pk__file_unmap(&labels);
    return status;
}

/* ---- CSV ---- */

/* The next field of a line, without the spaces around it; the cursor moves past its comma. 1 where a comma
 * followed. quotes: a field in quotes may hold commas. */
static int pk__csv_field(pk__cursor *line, int quotes, const char **field, size_t *length)
{
    const char *start = line->at, *end;
    int quoted = 0;
    for (end = start; end < line->end && (*end != ',' || quoted); end++)
        quoted ^= quotes && *end == '"';
    line->at = end < line->end ? end + 1 : end;
    int more = end < line->end;
    while (start < end && (*start == ' ' || *start == '\t'))
        start++;
    while (start < end && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    *field = start;
    *length = (size_t)(end - start);
    return more;
}

/* The line at *at without its LF or CRLF; *at moves past it. */
static pk__cursor pk__csv_line(const char **at, const char *end)
{
    pk__cursor line = {*at, end};
    const char *feed = (const char *)memchr(*at, '\n', (size_t)(end - *at));
    if (feed)
        line.end = feed;
    *at = feed ? feed + 1 : end;
    if (line.end > line.at && line.end[-1] == '\r')
        line.end--;
    return line;
}

/* pk_dataset_csv after its file is in memory. */
PK__PRIVATE pk_status pk__csv_dataset(pk_context *context, const char *name, const char *text, size_t size,
                                      int target_columns, pk_dataset *dataset)
{
    const char *end = size ? text + size : text, *at = text, *field;
    char shown[40];
    size_t length, columns = 1, numbers = 0, line_number = 1, rows = 0, column;
    double value;
    if (size >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
        at = text += 3; /* a byte order mark */
    while (end > text && (end[-1] == '\n' || end[-1] == '\r' || end[-1] == ' ' || end[-1] == '\t'))
        end--;
    if (end == text)
        return pk__fail(context, PK_FORMAT, "%s: holds no numbers", name);
    pk__cursor line = pk__csv_line(&at, end), again = line;
    for (columns = 1; pk__csv_field(&line, 0, &field, &length); columns++)
        numbers += (size_t)pk__number(field, length, &value);
    numbers += (size_t)pk__number(field, length, &value);
    if (!numbers) { /* a header */
        for (columns = 1; pk__csv_field(&again, 1, &field, &length); columns++)
            continue;
        text = at;
        line_number = 2;
    }
    size_t outputs = target_columns ? (size_t)target_columns : 1;
    if (columns <= outputs)
        return pk__fail(context, PK_FORMAT,
                        "%s: line 1 has %zu columns, there must be more than the %zu of the targets", name,
                        columns, outputs);
    /* Count first, so that memory is asked for only where the file holds as much. */
    for (at = text; at < end; rows++) {
        size_t commas = 0;
        line = pk__csv_line(&at, end);
        if (line.at == line.end)
            return pk__fail(context, PK_FORMAT, "%s: line %zu is empty", name, line_number + rows);
        for (; line.at < line.end; line.at++)
            commas += *line.at == ',';
        if (commas + 1 != columns)
            return pk__fail(context, PK_FORMAT, "%s: line %zu has %zu columns, line 1 has %zu", name,
                            line_number + rows, commas + 1, columns);
    }
    if (!rows)
        return pk__fail(context, PK_FORMAT, "%s: holds a header but no numbers", name);
    pk_dataset made;
    size_t shape[2] = {rows, columns - outputs};
    pk_status status =
        pk__dataset_allocate(context, 2, shape, target_columns ? PK_FLOAT64 : PK_INT64, outputs, &made);
    if (status)
        return status;
    double *inputs = (double *)made.inputs.owned, *targets = (double *)made.targets.owned;
    int64_t *labels = (int64_t *)made.targets.owned;
    for (at = text; at < end && !status; line_number++) {
        line = pk__csv_line(&at, end);
        for (column = 0; column < columns; column++) {
            pk__csv_field(&line, 0, &field, &length);
            int good = pk__number(field, length, &value);
            if (good && column < columns - outputs)
                *inputs++ = value;
            else if (good && target_columns)
                *targets++ = value;
            else if (good && value > -9007199254740992.0 && value < 9007199254740992.0 && value == floor(value))
                *labels++ = (int64_t)value;
            else
                status = pk__fail(context, PK_FORMAT, "%s: line %zu, column %zu: '%s' is not %s", name,
                                  line_number, column + 1, pk__printable(field, length, shown, sizeof shown),
                                  good ? "an integer label" : "a finite number");
            if (status)
                break;
        }
    }
    if (!status)
        *dataset = made;
    else
        pk_dataset_release(context, &made);
    return status;
}

PK_API pk_status pk_dataset_csv(pk_context *context, const char *path, int target_columns, pk_dataset *dataset)
{
    pk__file file;
    if (!path || !dataset || target_columns < 0)
        return pk__fail(context, PK_ARGUMENT,
                        "pk_dataset_csv: a pointer is NULL, or target_columns %d is negative", target_columns);
    pk_status status = pk__file_map(context, path, &file);
    if (!status)
        status = pk__csv_dataset(context, pk__name(path), (const char *)file.bytes, file.size, target_columns,
                                 dataset);
    pk__file_unmap(&file);
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
