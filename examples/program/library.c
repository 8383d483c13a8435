/* The library's implementation, in a file of its own so that a change of the program does not compile it again. */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
