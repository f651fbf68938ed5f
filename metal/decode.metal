// Codes to rotated vectors, for prefill: what TurboQuant.decode defines. One thread
// decodes one group of 16 elements, in float.

#include "unpack.h"

// words: of the vector; coefficients: of u, u^3, ..., TERMS of them; out: the vector.
template <typename T, int DIM, int BITS, int TERMS>
TQ_FUNC void decode_group(
    const device uint* words, float scale, const device float* coefficients, uint group,
    device T* out) {
  constexpr uint GROUPS = (DIM + 15) / 16;
  constexpr uint CODES = (1u << BITS) - 1u;
  GroupCodes<BITS> codes = load_group<BITS>(place_group<BITS>(words, group, GROUPS), 0);
  TQ_UNROLL
  for (int p = 0; p < 8; p++) {
    int index;
    uint word = pair_word<BITS>(codes, p, index);
    TQ_UNROLL
    for (int e = 0; e < 2; e++) {
      uint code = (word >> (BITS * index + 16 * e)) & CODES;
      float u = (float(code) - 0.5f * float(CODES)) / float(1u << BITS);
      float level = coefficients[TERMS - 1];
      TQ_UNROLL
      for (int i = TERMS - 2; i >= 0; i--) level = level * (u * u) + coefficients[i];
      int d = int(group) * 16 + 2 * p + e;
      if (d < DIM) out[d] = T(level * u * scale);
    }
  }
}
