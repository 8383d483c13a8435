/* A user of the installed package: which backend multiplies, and whether it multiplies rightly. */
#include <pathkernel.h>
#include <stdio.h>

int main(void)
{
    char backend[64];
    pk_real a[4] = {1, 2, 3, 4}, b[4] = {5, 6, 7, 8}, c[4] = {0, 0, 0, 0};
    const pk_real product[4] = {19, 22, 43, 50};
    pk_status status = pk_matrix_multiply(NULL, 1, pk_matrix_view(a, 2, 2), 0, pk_matrix_view(b, 2, 2), 0, 0,
                                          pk_matrix_view(c, 2, 2));
    pk_matrix_backend(backend, sizeof backend);
    printf("pathkernel %s, %s, %d thread(s): %s\n", pk_version(), backend, pk_threads(NULL), pk_status_text(status));
    for (int i = 0; i < 4; i++)
        if (c[i] != product[i])
            status = PK_NOT_FINITE;
    return status == PK_OK ? 0 : 1;
}
