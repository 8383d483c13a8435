/* One half of a program of two files: declarations only. */
#include "use.h"

int main(void)
{
    return use_pathkernel();
}
