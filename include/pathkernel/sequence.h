/* pathkernel/sequence.h: operations on tokens: embedding, attention, and what makes one vector of several. */
#ifndef PATHKERNEL_SEQUENCE_H
#define PATHKERNEL_SEQUENCE_H
#include "structure.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes, for pk_graph_add. */
enum { PK_EMBEDDING_TOKENS, PK_EMBEDDING_WIDTH };
enum { PK_ATTEND_HEADS, PK_ATTEND_CAUSAL, PK_ATTEND_SHARED };
enum { PK_TOKEN_INDEX };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SEQUENCE_IMPLEMENTED)
#define PATHKERNEL_SEQUENCE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_C

PK__END_C
/* <<< implementation */
#endif
