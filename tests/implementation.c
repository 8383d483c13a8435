/* The one file of a test program that holds the implementation. */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel_under_test.h"
