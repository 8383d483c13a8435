/* The other half: the implementation, after a header of the C library, as in code that grew. */
#include <stdio.h>
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
