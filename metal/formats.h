// All formats of format.h. A kernel that is built for some kinds of codes may leave the
// others out (`split_kv_kernel` of kernels/attention.py).

#include "format_points.h"
#include "format_polynomial.h"
#include "format_trellis.h"
