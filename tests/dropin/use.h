/* A small use of the library, the same from C and C++, with or without its implementation in this file. */
#include "pathkernel.h"
#include <stdio.h>
#include <string.h>

/* 0 when a dense layer on two inputs gives what it must, 10 + 2 * 20 + 3. */
static int use_pathkernel(void)
{
    pk_context context;
    pk_graph graph;
    pk_real weights[3] = {1, 2, 3}, input[2] = {10, 20}, output = 0;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    pk_status status = pk_network_parse(&context, "input 2; dense 1", &graph);
    if (status == PK_OK)
        status = pk_graph_evaluate(&context, &graph, weights, pk_matrix_view(input, 1, 2),
                                   pk_matrix_view(&output, 1, 1));
    if (status != PK_OK)
        printf("pathkernel %s: %s: %s\n", pk_version(), pk_status_text(status), pk_message(&context));
    pk_graph_release(&context, &graph);
    if (strcmp(pk_version(), PK_VERSION) != 0) {
        printf("the header is %s, the implementation is %s\n", PK_VERSION, pk_version());
        return 1;
    }
    return status == PK_OK && output == (pk_real)53 ? 0 : 1;
}
