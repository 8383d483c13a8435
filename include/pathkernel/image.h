/* pathkernel/image.h: operations on images of channels x height x width: convolution and pooling. */
#ifndef PATHKERNEL_IMAGE_H
#define PATHKERNEL_IMAGE_H
#include "dense.h"
#include "structure.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes of conv and of the pools, for pk_graph_add; pairs are height, width. */
enum {
    PK_CONVOLUTION_CHANNELS,
    PK_CONVOLUTION_KERNEL,
    PK_CONVOLUTION_STRIDE = 3,
    PK_CONVOLUTION_PAD = 5,
    PK_CONVOLUTION_DILATION = 7,
    PK_CONVOLUTION_GROUPS = 9,
    PK_CONVOLUTION_BIAS,
    PK_CONVOLUTION_INITIAL,
    PK_CONVOLUTION_GAIN
};
enum { PK_POOL_KERNEL, PK_POOL_STRIDE = 2 /* 0: the kernel */, PK_POOL_PAD = 4 };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_IMAGE_IMPLEMENTED)
#define PATHKERNEL_IMAGE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_C

PK__END_C
/* <<< implementation */
#endif
