/* pathkernel/network/operations.h: the built-in operations of the autodiff by name.
 *
 * To add one, write its rules and its line in its module's table; to add one from outside, fill a pk_operation
 * and give it to pk_graph_add. The engine knows nothing of single operations.
 */
#ifndef PATHKERNEL_OPERATIONS_H
#define PATHKERNEL_OPERATIONS_H
#include "image.h"
#include "norm.h"
#include "sequence.h"
#include "values.h"

/* >>> declarations */
PK__BEGIN_C

/* A built-in operation by name, NULL where there is none. */
PK_API const pk_operation *pk_operation_find(const char *name);
/* The built-in operations one by one: NULL behind the last one. */
PK_API const pk_operation *pk_operation_at(size_t index);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_OPERATIONS_IMPLEMENTED)
#define PATHKERNEL_OPERATIONS_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_COLD_CODE

PK_API const pk_operation *pk_operation_at(size_t index)
{
    static const struct {
        const pk_operation *operations;
        size_t count;
    } tables[] = {
        {pk__dense_operations, sizeof pk__dense_operations / sizeof *pk__dense_operations},
        {pk__activation_operations, sizeof pk__activation_operations / sizeof *pk__activation_operations},
        {pk__structure_operations, sizeof pk__structure_operations / sizeof *pk__structure_operations},
        {pk__image_operations, sizeof pk__image_operations / sizeof *pk__image_operations},
        {pk__norm_operations, sizeof pk__norm_operations / sizeof *pk__norm_operations},
        {pk__sequence_operations, sizeof pk__sequence_operations / sizeof *pk__sequence_operations},
        {pk__values_operations, sizeof pk__values_operations / sizeof *pk__values_operations},
    };
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (index < tables[i].count)
            return &tables[i].operations[index];
        index -= tables[i].count;
    }
    return NULL;
}

PK_API const pk_operation *pk_operation_find(const char *name)
{
    const pk_operation *operation;
    for (size_t i = 0; (operation = pk_operation_at(i)) != NULL; i++)
        if (strcmp(name, operation->name) == 0)
            return operation;
    return NULL;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
