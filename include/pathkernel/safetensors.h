/* pathkernel/safetensors.h: weights as a .safetensors file, as PyTorch users exchange them.
 *
 * The names are those of the state_dict of an nn.Sequential of the network's layers: layer k of the network
 * line, counted from 0 after `input`, has "k.weight" (out, in) and, unless nobias, "k.bias" (out).
 *
 * The file: 8 bytes, little-endian, the length of the header; the header, a JSON object
 *     {"__metadata__": {"format": "pt"}, "0.weight": {"dtype": "F64", "shape": [2, 3], "data_offsets": [0, 48]}, ...}
 * padded with blanks; the numbers, little-endian, in C order, without holes.
 */
#ifndef PATHKERNEL_SAFETENSORS_H
#define PATHKERNEL_SAFETENSORS_H
#include "array.h"
#include "graph.h"

/* >>> declarations */
PK__BEGIN_C

/* Writes the weights (P) of a graph as float64, or rounded to float32. path + ".tmp" first, then renamed: path
 * is either as before or complete. Holds the whole file in memory. PK_ARGUMENT; PK_UNSUPPORTED where an
 * operation does not say the shape of its weights; PK_NOT_FINITE names the tensor, the same where a number is
 * too large for float32; PK_MEMORY, PK_MEMORY_LIMIT, PK_OVERFLOW, PK_IO. */
PK_API PK__MUST_USE pk_status pk_safetensors_write(pk_context *context, const char *path, const pk_graph *graph,
                                                   const pk_real *weights, int float32);

/* weights (P) = those of the file, which must hold exactly the graph's tensors, in any order, each float32 or
 * float64, all finite. weights is untouched on an error. PK_FORMAT: not a safetensors file, or one that lies;
 * PK_SHAPE: a tensor is missing, has another shape, or is not of this network; PK_UNSUPPORTED: another item
 * type, or as above; PK_NOT_FINITE; PK_ARGUMENT, PK_MEMORY, PK_MEMORY_LIMIT, PK_IO. The message names the file
 * and the tensor. */
PK_API PK__MUST_USE pk_status pk_safetensors_read(pk_context *context, const char *path, const pk_graph *graph,
                                                  pk_real *weights);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SAFETENSORS_IMPLEMENTED)
#define PATHKERNEL_SAFETENSORS_IMPLEMENTED
/* >>> implementation */
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
PK__BEGIN_CODE

/* ---- what a graph has ------------------------------------------------------------------------------ */

enum { PK__TENSOR_NAME = 64 }; /* bytes; longer names in a file are none of ours */

/* A tensor of the graph, and where it stands in a file's data. */
typedef struct pk__tensor_place {
    char name[PK__TENSOR_NAME];
    int rank;
    size_t shape[2], items;
    size_t weight_offset; /* in the flat vector */
    pk_type type;         /* 0: not found in the file */
    size_t begin, end;    /* bytes after the header */
} pk__tensor_place;

typedef struct pk__tensor_list {
    size_t count;
    pk__tensor_place *places; /* sorted by name */
} pk__tensor_list;

PK__COLD_BEGIN

static int pk__tensor_by_name(const void *a, const void *b)
{
    return strcmp(((const pk__tensor_place *)a)->name, ((const pk__tensor_place *)b)->name);
}

static int pk__tensor_by_begin(const void *a, const void *b)
{
    size_t x = ((const pk__tensor_place *)a)->begin, y = ((const pk__tensor_place *)b)->begin;
    return (x > y) - (x < y);
}

static void pk__tensor_add(pk__tensor_list *list, size_t layer, const char *kind, int rank, size_t out,
                           size_t in, size_t offset)
{
    pk__tensor_place *place = &list->places[list->count++];
    snprintf(place->name, sizeof place->name, "%zu.%s", layer, kind);
    place->rank = rank;
    place->shape[0] = out;
    place->shape[1] = in;
    place->items = out * in;
    place->weight_offset = offset;
}

/* Release list->places. */
static pk_status pk__tensor_list_take(pk_context *context, const pk_graph *graph, pk__tensor_list *list)
{
    list->count = 0;
    pk_status status =
        pk_allocate(context, graph->layers, 2 * sizeof *list->places, "the list of tensors", &list->places);
    for (size_t n = 1; n < graph->node_count && status == PK_OK; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!node->weight_count)
            continue;
        size_t out = node->fan_out, in = node->fan_in, offset = node->weight_offset;
        if (node->tangent_form != PK_TANGENT_OUTER)
            status = pk__fail(context, PK_UNSUPPORTED,
                              "safetensors: layer %zu, '%s': the shape of its weights is not known", n - 1,
                              node->operation->name);
        else
            pk__tensor_add(list, n - 1, "weight", 2, out, in, offset);
        if (status == PK_OK && node->weight_count > out * in)
            pk__tensor_add(list, n - 1, "bias", 1, out, 1, offset + out * in);
    }
    if (status != PK_OK) {
        pk_release(context, list->places);
        list->places = NULL;
    }
    return status;
}

/* "(32, 64)". Returns text. */
static const char *pk__tensor_shape(int rank, const size_t *shape, char *text, size_t size)
{
    pk_array array = pk_array_view(PK_UINT8, rank, shape, NULL);
    if (!array.type)
        snprintf(text, size, "(too large)");
    else
        pk__shape_text(&array, text, size);
    return text;
}

/* ---- JSON ------------------------------------------------------------------------------------------ */

/* A string, its escapes undone; what is not ASCII becomes '?', and what is too long for text gets a last
 * character that no name has, so that it equals none. 0 where there is no string. */
static int pk__json_string(pk__cursor *json, char *text, size_t size)
{
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    size_t used = 0;
    if (!pk__take(json, '"'))
        return 0;
    while (json->at < json->end && *json->at != '"') {
        char c = *json->at++;
        if ((unsigned char)c < 32)
            return 0;
        if (c == '\\') {
            if (json->at == json->end)
                return 0;
            const char *found = *json->at ? strchr(escapes, *json->at) : NULL;
            if (found) {
                c = meanings[found - escapes];
            } else if (*json->at == 'u' && json->end - json->at > 4) {
                unsigned code = 0;
                for (int i = 1; i <= 4; i++) {
                    char digit = json->at[i];
                    int value = digit >= '0' && digit <= '9'   ? digit - '0'
                                : digit >= 'a' && digit <= 'f' ? digit - 'a' + 10
                                : digit >= 'A' && digit <= 'F' ? digit - 'A' + 10
                                                               : -1;
                    if (value < 0)
                        return 0;
                    code = 16 * code + (unsigned)value;
                }
                json->at += 4;
                c = code && code < 128 ? (char)code : '?';
            } else {
                return 0;
            }
            json->at++;
        } else if ((unsigned char)c > 126) {
            c = '?';
        }
        if (used + 1 < size)
            text[used++] = c;
        else
            text[used - 1] = '?';
    }
    text[used] = 0;
    return pk__take(json, '"');
}

/* [1, 2, ...]: non-negative integers, at most most of them are kept; *count may be more. 0: no such list. */
static int pk__json_sizes(pk__cursor *json, int most, size_t *sizes, int *count)
{
    *count = 0;
    if (!pk__take(json, '['))
        return 0;
    if (pk__take(json, ']'))
        return 1;
    do {
        size_t size = 0;
        pk__peek(json);
        const char *start = json->at;
        for (; json->at < json->end && *json->at >= '0' && *json->at <= '9'; json->at++) {
            if (size > (SIZE_MAX - 9) / 10)
                return 0;
            size = 10 * size + (size_t)(*json->at - '0');
        }
        if (json->at == start || (*start == '0' && json->at - start > 1))
            return 0;
        if (*count < most)
            sizes[*count] = size;
        if (*count < 1000)
            ++*count;
    } while (pk__take(json, ','));
    return pk__take(json, ']');
}

/* {"string": "string", ...} */
static int pk__json_metadata(pk__cursor *json)
{
    char text[8];
    if (!pk__take(json, '{'))
        return 0;
    if (pk__take(json, '}'))
        return 1;
    do {
        if (!pk__json_string(json, text, sizeof text) || !pk__take(json, ':') ||
            !pk__json_string(json, text, sizeof text))
            return 0;
    } while (pk__take(json, ','));
    return pk__take(json, '}');
}

typedef struct pk__tensor_entry {
    char dtype[16];
    int rank, bounds;
    size_t shape[PK_ARRAY_RANK], offsets[2];
} pk__tensor_entry;

/* {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, each key once, in any order. */
static int pk__json_tensor(pk__cursor *json, pk__tensor_entry *entry)
{
    static const char *const keys[3] = {"dtype", "shape", "data_offsets"};
    int seen[3] = {0, 0, 0};
    memset(entry, 0, sizeof *entry);
    if (!pk__take(json, '{'))
        return 0;
    do {
        char key[16];
        int which = 0;
        if (!pk__json_string(json, key, sizeof key) || !pk__take(json, ':'))
            return 0;
        while (which < 3 && strcmp(key, keys[which]) != 0)
            which++;
        if (which == 3 || seen[which]++)
            return 0;
        if (which == 0   ? !pk__json_string(json, entry->dtype, sizeof entry->dtype)
            : which == 1 ? !pk__json_sizes(json, PK_ARRAY_RANK, entry->shape, &entry->rank) ||
                               entry->rank > PK_ARRAY_RANK
                         : !pk__json_sizes(json, 2, entry->offsets, &entry->bounds) || entry->bounds != 2)
            return 0;
    } while (pk__take(json, ','));
    return pk__take(json, '}') && seen[0] && seen[1] && seen[2];
}

/* ---- reading --------------------------------------------------------------------------------------- */

/* Does an entry of the file fit the tensor of its name? Then it is noted there. */
static pk_status pk__tensor_found(pk_context *context, const char *file, size_t data_bytes, const char *name,
                                  const pk__tensor_entry *entry, pk__tensor_list *list)
{
    pk__tensor_place wanted, *place = NULL;
    char has[200], should[200];
    memcpy(wanted.name, name, sizeof wanted.name);
    if (list->count)
        place =
            (pk__tensor_place *)bsearch(&wanted, list->places, list->count, sizeof wanted, pk__tensor_by_name);
    if (!place)
        return pk__fail(context, PK_SHAPE, "%s: holds '%s', which the network does not have", file, name);
    if (place->type)
        return pk__fail(context, PK_FORMAT, "%s: holds '%s' twice", file, name);
    pk_type type = strcmp(entry->dtype, "F64") == 0   ? PK_FLOAT64
                   : strcmp(entry->dtype, "F32") == 0 ? PK_FLOAT32
                                                      : (pk_type)0;
    if (!type)
        return pk__fail(context, PK_UNSUPPORTED, "%s: '%s' holds %s; F32 and F64 are supported", file, name,
                        entry->dtype);
    int same = entry->rank == place->rank;
    for (int i = 0; same && i < place->rank; i++)
        same = entry->shape[i] == place->shape[i];
    if (!same)
        return pk__fail(context, PK_SHAPE, "%s: '%s' is %s, the network's is %s", file, name,
                        pk__tensor_shape(entry->rank, entry->shape, has, sizeof has),
                        pk__tensor_shape(place->rank, place->shape, should, sizeof should));
    if (entry->offsets[0] > entry->offsets[1] || entry->offsets[1] > data_bytes ||
        entry->offsets[1] - entry->offsets[0] != place->items * pk_type_size(type))
        return pk__fail(context, PK_FORMAT, "%s: '%s' is said to be bytes %zu to %zu of %zu; it takes %zu",
                        file, name, entry->offsets[0], entry->offsets[1], data_bytes,
                        place->items * pk_type_size(type));
    place->type = type;
    place->begin = entry->offsets[0];
    place->end = entry->offsets[1];
    return PK_OK;
}

static pk_status pk__safetensors_header(pk_context *context, const char *file, const unsigned char *bytes,
                                        size_t size, size_t data_bytes, pk__tensor_list *list)
{
    pk__cursor json = {(const char *)bytes, (const char *)bytes + size};
    char name[PK__TENSOR_NAME], text[64];
    int metadata = 0, good = pk__take(&json, '{'), more = good && pk__peek(&json) != '}';
    while (more) {
        pk__tensor_entry entry;
        if (!pk__json_string(&json, name, sizeof name) || !pk__take(&json, ':')) {
            good = 0;
        } else if (strcmp(name, "__metadata__") == 0) {
            good = !metadata++ && pk__json_metadata(&json);
        } else if (!pk__json_tensor(&json, &entry)) {
            return pk__fail(context, PK_FORMAT, "%s: the header's entry '%s' is malformed", file,
                            pk__printable(name, strlen(name), text, sizeof text));
        } else {
            pk__printable(name, strlen(name), name, sizeof name); /* no name of ours is changed by that */
            pk_status status = pk__tensor_found(context, file, data_bytes, name, &entry, list);
            if (status != PK_OK)
                return status;
        }
        more = good && pk__take(&json, ',');
    }
    /* Blanks may follow, nothing else. */
    if (!good || !pk__take(&json, '}') || (pk__peek(&json), json.at != json.end))
        return pk__fail(context, PK_FORMAT, "%s: the header is not that of a safetensors file, at byte %zu",
                        file, (size_t)(json.at - (const char *)bytes) + 8);
    size_t expected = 0;
    for (size_t i = 0; i < list->count; i++)
        if (!list->places[i].type)
            return pk__fail(context, PK_SHAPE, "%s: has no tensor '%s'", file, list->places[i].name);
    qsort(list->places, list->count, sizeof *list->places, pk__tensor_by_begin);
    for (size_t i = 0; i < list->count; expected = list->places[i++].end)
        if (list->places[i].begin != expected)
            return pk__fail(context, PK_FORMAT, "%s: '%s' starts at byte %zu of the data, not at %zu", file,
                            list->places[i].name, list->places[i].begin, expected);
    if (expected != data_bytes)
        return pk__fail(context, PK_FORMAT, "%s: %zu bytes follow the last tensor", file,
                        data_bytes - expected);
    return PK_OK;
}

/* Item i of a tensor in the file: of any alignment. */
static double pk__tensor_item(const pk__tensor_place *place, const unsigned char *data, size_t i)
{
    double number;
    float single;
    if (place->type == PK_FLOAT64) {
        memcpy(&number, data + place->begin + 8 * i, sizeof number);
        return number;
    }
    memcpy(&single, data + place->begin + 4 * i, sizeof single);
    return single;
}

/* 1 where a number is finite, also as float if narrow. */
static int pk__tensor_finite(double number, int narrow)
{
    return pk__finite(number) && (!narrow || (number >= -FLT_MAX && number <= FLT_MAX));
}

/* The file's bytes into weights, which is untouched on an error. */
PK__PRIVATE pk_status pk__safetensors_parse(pk_context *context, const char *file, const unsigned char *bytes,
                                            size_t size, const pk_graph *graph, pk_real *weights)
{
    uint64_t length = 0;
    if (size < 8)
        return pk__fail(context, PK_FORMAT, "%s: %zu bytes are no safetensors file", file, size);
    for (int i = 0; i < 8; i++)
        length |= (uint64_t)bytes[i] << 8 * i;
    if (length > size - 8)
        return pk__fail(context, PK_FORMAT,
                        "%s: is no safetensors file, or cut off: a header of %llu bytes in %zu", file,
                        (unsigned long long)length, size);
    pk__tensor_list list;
    pk_status status = pk__tensor_list_take(context, graph, &list);
    if (status != PK_OK)
        return status;
    const unsigned char *data = bytes + 8 + length;
    qsort(list.places, list.count, sizeof *list.places, pk__tensor_by_name);
    status = pk__safetensors_header(context, file, bytes + 8, (size_t)length, size - 8 - (size_t)length, &list);
    for (size_t t = 0; t < list.count && status == PK_OK; t++)
        for (size_t i = 0; i < list.places[t].items && status == PK_OK; i++)
            if (!pk__tensor_finite(pk__tensor_item(&list.places[t], data, i), sizeof(pk_real) == 4))
                status = pk__fail(context, PK_NOT_FINITE, "%s: item %zu of '%s' is %g", file, i,
                                  list.places[t].name, pk__tensor_item(&list.places[t], data, i));
    for (size_t t = 0; t < list.count && status == PK_OK; t++)
        for (size_t i = 0; i < list.places[t].items; i++)
            weights[list.places[t].weight_offset + i] = (pk_real)pk__tensor_item(&list.places[t], data, i);
    pk_release(context, list.places);
    return status;
}

PK_API pk_status pk_safetensors_read(pk_context *context, const char *path, const pk_graph *graph,
                                     pk_real *weights)
{
    if (!path || !graph || !graph->parameters || !weights)
        return pk__fail(context, PK_ARGUMENT,
                        "pk_safetensors_read: the path, the network or the weights are missing");
    pk__file file;
    pk_status status = pk__file_map(context, path, &file);
    if (status == PK_OK)
        status = pk__safetensors_parse(context, pk__name(path), file.bytes, file.size, graph, weights);
    pk__file_unmap(&file);
    return status;
}

/* ---- writing --------------------------------------------------------------------------------------- */

/* The header and its length before it into bytes, unless that is NULL. Returns the size of both. */
static size_t pk__safetensors_head(const pk__tensor_list *list, int float32, size_t room, unsigned char *bytes)
{
    char line[256];
    size_t used = 8, begin = 0;
    for (size_t t = 0; t <= list->count; t++) {
        int length = 0;
        if (t < list->count) {
            const pk__tensor_place *place = &list->places[t];
            size_t end = begin + place->items * (float32 ? 4 : 8);
            char shape[64];
            snprintf(shape, sizeof shape, place->rank == 1 ? "%zu" : "%zu,%zu", place->shape[0],
                     place->shape[1]);
            length = snprintf(line, sizeof line,
                              "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                              t ? "," : "{\"__metadata__\":{\"format\":\"pt\"},", place->name,
                              float32 ? "F32" : "F64", shape, begin, end);
            begin = end;
        } else {
            length = snprintf(line, sizeof line, "}");
        }
        if (bytes && (size_t)length <= room - used)
            memcpy(bytes + used, line, (size_t)length);
        used += (size_t)length;
    }
    while (used % 8 != 0) { /* the numbers are aligned when the file is mapped */
        if (bytes)
            bytes[used] = ' ';
        used++;
    }
    for (int i = 0; bytes && i < 8; i++)
        bytes[i] = (unsigned char)((uint64_t)(used - 8) >> 8 * i);
    return used;
}

static pk_status pk__safetensors_fill(pk_context *context, const char *file, const pk__tensor_list *list,
                                      const pk_real *weights, int float32, unsigned char *data)
{
    for (size_t t = 0; t < list->count; t++)
        for (size_t i = 0; i < list->places[t].items; i++) {
            double number = (double)weights[list->places[t].weight_offset + i];
            if (!pk__tensor_finite(number, float32))
                return pk__fail(context, PK_NOT_FINITE, "%s: item %zu of '%s' is %g, not a finite %s", file, i,
                                list->places[t].name, number, float32 ? "float32" : "float64");
            float single = float32 ? (float)number : 0;
            memcpy(data, float32 ? (const void *)&single : (const void *)&number, float32 ? 4 : 8);
            data += float32 ? 4 : 8;
        }
    return PK_OK;
}

/* path becomes these bytes, or stays as it is. */
static pk_status pk__safetensors_replace(pk_context *context, const char *path, const unsigned char *bytes,
                                         size_t size)
{
    size_t length = strlen(path);
    char *aside = NULL;
    pk_status status = pk_allocate(context, length + 5, 1, "the name of a file", &aside);
    if (status != PK_OK)
        return status;
    memcpy(aside, path, length);
    memcpy(aside + length, ".tmp", 5);
    int file = open(aside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), good = file >= 0, reason = errno;
    if (file >= 0) {
        good = pk__write_at(file, bytes, size, 0);
        reason = errno;
        if (close(file) != 0 && good)
            good = 0, reason = errno;
        if (good && rename(aside, path) != 0)
            good = 0, reason = errno;
        if (!good)
            unlink(aside);
    }
    if (!good)
        status = pk__fail(context, PK_IO, "%s: %zu bytes cannot be written: %s", pk__name(path), size,
                          strerror(reason));
    pk_release(context, aside);
    return status;
}

PK_API pk_status pk_safetensors_write(pk_context *context, const char *path, const pk_graph *graph,
                                      const pk_real *weights, int float32)
{
    if (!path || !graph || !graph->parameters || !weights)
        return pk__fail(context, PK_ARGUMENT,
                        "pk_safetensors_write: the path, the network or the weights are missing");
    pk__tensor_list list;
    pk_status status = pk__tensor_list_take(context, graph, &list);
    if (status != PK_OK)
        return status;
    unsigned char *bytes = NULL;
    size_t head = pk__safetensors_head(&list, float32, 0, NULL), size = 0;
    if (!pk__multiply(graph->parameters, float32 ? 4 : 8, &size) || size > SIZE_MAX / 2 - head)
        status =
            pk__fail(context, PK_OVERFLOW, "%s: %zu parameters overflow", pk__name(path), graph->parameters);
    else
        status = pk_allocate(context, head + size, 1, "the text of a safetensors file", &bytes);
    if (status == PK_OK) {
        pk__safetensors_head(&list, float32, head, bytes);
        status = pk__safetensors_fill(context, pk__name(path), &list, weights, float32, bytes + head);
    }
    if (status == PK_OK)
        status = pk__safetensors_replace(context, path, bytes, head + size);
    pk_release(context, bytes);
    pk_release(context, list.places);
    return status;
}

PK__COLD_END

PK__END_CODE
/* <<< implementation */
#endif
