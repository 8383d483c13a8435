#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#include "use.h"

#ifdef __cplusplus
extern "C"
#endif
int other(void);

int other(void)
{
    return use_pathkernel();
}
