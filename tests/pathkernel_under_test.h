/* What the tests include: the committed single header (PATHKERNEL_TEST_AMALGAM), or the modules. */
#ifdef PATHKERNEL_TEST_AMALGAM
#include "pathkernel.h"
#else
#include "pathkernel/autodiff.h"
#include "pathkernel/decompose.h"
#include "pathkernel/kernel.h"
#include "pathkernel/train.h"
#endif
