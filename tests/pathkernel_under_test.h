/* What the tests include: the committed single header (PATHKERNEL_TEST_AMALGAM), or the modules; a test that brings an
 * implementation of its own, the module that it names (UNDER_TEST): to compile all of them takes minutes with sanitizers. */
#if defined(UNDER_TEST)
#include UNDER_TEST
#elif defined(PATHKERNEL_TEST_AMALGAM)
#include "pathkernel.h"
#else
#include "pathkernel/training/derivatives.h"
#include "pathkernel/attribution/compare.h"
#include "pathkernel/attribution/reference.h"
#include "pathkernel/attribution/smoother.h"
#include "pathkernel/attribution/sensitivity.h"
#include "pathkernel/attribution/influence.h"
#include "pathkernel/kernels/machine.h"
#include "pathkernel/kernels/kernel.h"
#include "pathkernel/kernels/file.h"
#include "pathkernel/kernels/domingos.h"
#include "pathkernel/kernels/novelty.h"
#include "pathkernel/kernels/sketch.h"
#include "pathkernel/kernels/nodes.h"
#include "pathkernel/run/train.h"
#include "pathkernel/binding/layout.h"
#endif

#include <float.h>
#include <math.h>

/* EITHER() is for numbers at the ends of the range. The tests' tolerances are written for double. ROUNDING() scales one to the rounding of pk_real; since much that is
 * loose for double would say nothing about float, it is there at most 4096 roundings, 5e-4. */
#ifdef PATHKERNEL_FLOAT
#define REAL_TYPE PK_FLOAT32
#define EITHER(for_double, for_float) (for_float)
#define ROUNDING(tolerance) fmin((tolerance) * ((double)FLT_EPSILON / DBL_EPSILON), 4096 * (double)FLT_EPSILON)
#else
#define REAL_TYPE PK_FLOAT64
#define EITHER(for_double, for_float) (for_double)
#define ROUNDING(tolerance) (tolerance)
#endif
