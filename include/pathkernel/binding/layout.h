/* pathkernel/binding/layout.h: where the fields of the library's structs are, for callers in languages that do not read C.
 *
 * A caller from Python's ctypes or the like has the structs declared a second time. A field that is added, moved or given
 * another type would then be read or written in the wrong place, and nothing would say so. So the library tells it:
 * examples/python/pathkernel.py builds its structs from this table, and refuses a library whose fields have other types.
 */
#ifndef PATHKERNEL_LAYOUT_H
#define PATHKERNEL_LAYOUT_H
#include "../attribution/compare.h"
#include "../kernels/nodes.h"
#include "../run/train.h"

/* >>> declarations */
PK__BEGIN_C

/* What a field is; pointers, structs and arrays are PK_FIELD_OTHER. */
typedef enum pk_field_kind { PK_FIELD_OTHER, PK_FIELD_FLOAT, PK_FIELD_SIGNED, PK_FIELD_UNSIGNED } pk_field_kind;

/* A field of a struct, a whole type (name is ""; pk_real is one, too), or a constant (type is ""; offset is its value). Fields of
 * fields that are structs have names like "graph.input_width". */
typedef struct pk_field {
    const char *type, *name;
    size_t offset, size; /* bytes */
    pk_field_kind kind;
} pk_field;

/* The table of them, one by one; NULL behind the last one. It has what callers read and write, not private fields. */
PK_API const pk_field *pk_layout(size_t index);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_LAYOUT_IMPLEMENTED)
#define PATHKERNEL_LAYOUT_IMPLEMENTED
/* >>> implementation */
PK__BEGIN_COLD_CODE

/* Enums are the integers that the compiler takes for them. */
/* clang-format off */
#define PK__FIELD_KIND(value)                                                            \
    _Generic((value), float: PK_FIELD_FLOAT, double: PK_FIELD_FLOAT,                     \
             int: PK_FIELD_SIGNED, long: PK_FIELD_SIGNED, long long: PK_FIELD_SIGNED,    \
             unsigned: PK_FIELD_UNSIGNED, unsigned long: PK_FIELD_UNSIGNED,              \
             unsigned long long: PK_FIELD_UNSIGNED, default: PK_FIELD_OTHER)
#define PK__TYPE(type) {#type, "", 0, sizeof(type), PK_FIELD_OTHER}
#define PK__FIELD(type, field)                                                           \
    {#type, #field, offsetof(type, field), sizeof(((const type *)0)->field),             \
     PK__FIELD_KIND(((const type *)0)->field)}
#define PK__CONSTANT(name) {"", #name, (size_t)(name), 0, PK_FIELD_OTHER}
/* clang-format on */

static const pk_field pk__layout[] = {
    {"pk_real", "", 0, sizeof(pk_real), PK_FIELD_FLOAT},
    PK__TYPE(pk_field),
    PK__TYPE(pk_context),
    PK__FIELD(pk_context, threads),
    PK__FIELD(pk_context, memory_limit),
    PK__FIELD(pk_context, progress),
    PK__FIELD(pk_context, progress_user),
    PK__FIELD(pk_context, memory_used),
    PK__FIELD(pk_context, memory_peak),
    PK__FIELD(pk_context, message),
    PK__TYPE(pk_matrix),
    PK__FIELD(pk_matrix, data),
    PK__FIELD(pk_matrix, rows),
    PK__FIELD(pk_matrix, cols),
    PK__FIELD(pk_matrix, ld),
    PK__TYPE(pk_array),
    PK__FIELD(pk_array, type),
    PK__FIELD(pk_array, rank),
    PK__FIELD(pk_array, shape),
    PK__FIELD(pk_array, data),
    PK__FIELD(pk_array, row_items),
    PK__TYPE(pk_dataset),
    PK__FIELD(pk_dataset, inputs),
    PK__FIELD(pk_dataset, targets),
    PK__TYPE(pk_graph),
    PK__FIELD(pk_graph, parameters),
    PK__FIELD(pk_graph, columns),
    PK__FIELD(pk_graph, checked),
    PK__FIELD(pk_graph, input_width),
    PK__FIELD(pk_graph, output_width),
    PK__FIELD(pk_graph, input_shape.rank),
    PK__FIELD(pk_graph, input_shape.dims),
    PK__FIELD(pk_graph, text),
    PK__TYPE(pk_constants),
    PK__FIELD(pk_constants, load),
    PK__FIELD(pk_constants, user),
    PK__TYPE(pk_run),
    PK__FIELD(pk_run, graph),
    PK__FIELD(pk_run, steps),
    PK__FIELD(pk_run, parameters),
    PK__FIELD(pk_run, examples),
    PK__FIELD(pk_run, outputs),
    PK__FIELD(pk_run, keep_every),
    PK__FIELD(pk_run, cut_off),
    PK__TYPE(pk_replay),
    PK__TYPE(pk_quadrature),
    PK__FIELD(pk_quadrature, rule),
    PK__FIELD(pk_quadrature, nodes),
    PK__TYPE(pk_average),
    PK__TYPE(pk_decompose_options),
    PK__FIELD(pk_decompose_options, quadrature),
    PK__FIELD(pk_decompose_options, average),
    PK__FIELD(pk_decompose_options, tolerance),
    PK__FIELD(pk_decompose_options, unattributed),
    PK__FIELD(pk_decompose_options, readout.kind),
    PK__FIELD(pk_decompose_options, readout.output),
    PK__FIELD(pk_decompose_options, readout.labels),
    PK__FIELD(pk_decompose_options, readout.count),
    PK__FIELD(pk_decompose_options, readout.function),
    PK__FIELD(pk_decompose_options, readout.user),
    PK__FIELD(pk_decompose_options, keep),
    PK__FIELD(pk_decompose_options, groups),
    PK__FIELD(pk_decompose_options, group_count),
    PK__FIELD(pk_decompose_options, bounds),
    PK__FIELD(pk_decompose_options, step_closure),
    PK__FIELD(pk_decompose_options, rows_at_once),
    PK__CONSTANT(PK_BY_EXAMPLE),
    PK__CONSTANT(PK_BY_GROUP),
    PK__CONSTANT(PK_BY_STEP),
    PK__CONSTANT(PK_BY_LAYER),
    PK__CONSTANT(PK_BY_TOTAL),
    PK__CONSTANT(PK_KEPT),
    PK__CONSTANT(PK_READOUT_ALL),
    PK__CONSTANT(PK_READOUT_ONE),
    PK__CONSTANT(PK_READOUT_LABEL),
    PK__CONSTANT(PK_READOUT_FUNCTION),
    PK__TYPE(pk_tensor),
    PK__FIELD(pk_tensor, axes),
    PK__FIELD(pk_tensor, rank),
    PK__FIELD(pk_tensor, shape),
    PK__FIELD(pk_tensor, data),
    PK__TYPE(pk_decomposition),
    PK__FIELD(pk_decomposition, rows),
    PK__FIELD(pk_decomposition, outputs),
    PK__FIELD(pk_decomposition, examples),
    PK__FIELD(pk_decomposition, groups),
    PK__FIELD(pk_decomposition, steps),
    PK__FIELD(pk_decomposition, layers),
    PK__FIELD(pk_decomposition, initial),
    PK__FIELD(pk_decomposition, final),
    PK__FIELD(pk_decomposition, data),
    PK__FIELD(pk_decomposition, decay),
    PK__FIELD(pk_decomposition, inherited),
    PK__FIELD(pk_decomposition, unattributed),
    PK__FIELD(pk_decomposition, closure),
    PK__FIELD(pk_decomposition, kept),
    PK__FIELD(pk_decomposition, kept_count),
    PK__FIELD(pk_decomposition, bounds),
    PK__FIELD(pk_decomposition, step_closure),
    PK__FIELD(pk_decomposition, worst_closure),
    PK__FIELD(pk_decomposition, worst_relative),
    PK__FIELD(pk_decomposition, worst_excess),
    PK__FIELD(pk_decomposition, worst_unattributed),
    PK__FIELD(pk_decomposition, unattributed_limit),
    PK__FIELD(pk_decomposition, scale),
    PK__FIELD(pk_decomposition, points),
    PK__FIELD(pk_decomposition, pieces),
    PK__FIELD(pk_decomposition, refused),
    PK__FIELD(pk_decomposition, passes),
    PK__FIELD(pk_decomposition, seconds),
    PK__TYPE(pk_kernel_options),
    PK__FIELD(pk_kernel_options, kind),
    PK__FIELD(pk_kernel_options, outputs),
    PK__FIELD(pk_kernel_options, output),
    PK__FIELD(pk_kernel_options, steps),
    PK__FIELD(pk_kernel_options, step_count),
    PK__FIELD(pk_kernel_options, quadrature),
    PK__FIELD(pk_kernel_options, tolerance),
    PK__FIELD(pk_kernel_options, unweighted),
    PK__FIELD(pk_kernel_options, by_layer),
    PK__FIELD(pk_kernel_options, append_one),
    PK__FIELD(pk_kernel_options, map),
    PK__CONSTANT(PK_OUTPUTS_NONE),
    PK__CONSTANT(PK_OUTPUTS_ONE),
    PK__TYPE(pk_kernel_report),
    PK__FIELD(pk_kernel_report, error),
    PK__FIELD(pk_kernel_report, points),
    PK__FIELD(pk_kernel_report, refused),
    PK__FIELD(pk_kernel_report, zero_rows),
    PK__FIELD(pk_kernel_report, seconds),
    PK__TYPE(pk_comparison),
    PK__FIELD(pk_comparison, rule),
    PK__FIELD(pk_comparison, residual_max),
    PK__FIELD(pk_comparison, residual_median),
    PK__FIELD(pk_comparison, spearman),
    PK__FIELD(pk_comparison, seconds),
    PK__CONSTANT(PK_COMPARE_RULES),
    PK__TYPE(pk_optimizer),
    PK__TYPE(pk_criterion),
    PK__TYPE(pk_schedule),
    PK__FIELD(pk_schedule, kind),
    PK__FIELD(pk_schedule, rate),
    PK__FIELD(pk_schedule, rates),
    PK__FIELD(pk_schedule, rates_count),
    PK__CONSTANT(PK_SCHEDULE_CONSTANT),
    PK__CONSTANT(PK_SCHEDULE_ARRAY),
    PK__TYPE(pk_train_options),
    PK__FIELD(pk_train_options, criterion),
    PK__FIELD(pk_train_options, optimizer),
    PK__FIELD(pk_train_options, schedule),
    PK__FIELD(pk_train_options, groups),
    PK__FIELD(pk_train_options, group_count),
    PK__FIELD(pk_train_options, group_schedules),
    PK__FIELD(pk_train_options, steps),
    PK__FIELD(pk_train_options, batch_size),
    PK__FIELD(pk_train_options, shuffle_off),
    PK__FIELD(pk_train_options, seed),
    PK__FIELD(pk_train_options, clip_norm),
    PK__FIELD(pk_train_options, record),
    PK__FIELD(pk_train_options, resume),
    PK__FIELD(pk_train_options, replace),
    PK__FIELD(pk_train_options, record_float32),
    PK__FIELD(pk_train_options, record_second_moments),
    PK__FIELD(pk_train_options, keep_every),
    PK__TYPE(pk_train_result),
    PK__FIELD(pk_train_result, steps),
    PK__FIELD(pk_train_result, resumed),
    PK__FIELD(pk_train_result, objective),
    PK__CONSTANT(PK_FLOAT64),
    PK__CONSTANT(PK_FLOAT32),
    PK__CONSTANT(PK_INT64),
    PK__CONSTANT(PK_UINT8),
    PK__CONSTANT(PK_INT8),
    PK__CONSTANT(PK_INT16),
    PK__CONSTANT(PK_INT32),
    PK__CONSTANT(PK_UINT16),
    PK__CONSTANT(PK_UINT32),
    PK__CONSTANT(PK_BOOL),
};

PK_API const pk_field *pk_layout(size_t index)
{
    return index < sizeof pk__layout / sizeof *pk__layout ? &pk__layout[index] : NULL;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
