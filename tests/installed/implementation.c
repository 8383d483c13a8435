#define PATHKERNEL_IMPLEMENTATION
#include <pathkernel.h>
