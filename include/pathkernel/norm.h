/* pathkernel/norm.h: operations on normalisation and softmax. */
#ifndef PATHKERNEL_NORM_H
#define PATHKERNEL_NORM_H
#include "structure.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes of normalize and rms_normalize (over the trailing dims dimensions), of standardize (epsilon alone), and of
 * affine, for pk_graph_add. */
enum { PK_NORM_EPSILON, PK_NORM_DIMS };
enum { PK_AFFINE_BIAS, PK_AFFINE_DIMS };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_NORM_IMPLEMENTED)
#define PATHKERNEL_NORM_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_C

PK__END_C
/* <<< implementation */
#endif
