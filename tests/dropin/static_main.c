/* Two files of one program, each with its own static copy of the library. */
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#include "use.h"

#ifdef __cplusplus
extern "C"
#endif
int other(void);

int main(void)
{
    return use_pathkernel() || other();
}
