// All formats of format.h, and the table that some of them look levels up in.

#include "format_points.h"
#include "format_polynomial.h"
#include "format_trellis.h"

// params: the gain, then points (x, y) of pairs, or a trellis's magnitudes (even, odd).
// table: tq_table_words of it, as halves.
template <int KIND, int BITS, bool SINGLE_TABLE>
TQ_FUNC void load_table(
    const device float* params, threadgroup half2* table, uint thread_index, uint threads) {
  if (KIND == POLYNOMIAL) return;
  uint copies = KIND == TRELLIS ? uint(tq_table_copies(SINGLE_TABLE)) : 1u;
  for (uint i = thread_index; i < uint(tq_table_words(KIND, BITS, SINGLE_TABLE)); i += threads) {
    const device float* point = params + 1u + 2u * (i / copies);
    table[i] = tq_half2(point[0], point[1]);
  }
}
