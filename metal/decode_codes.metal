// Codes to rotated vectors, for prefill: what ScalarCodec.decode and TableCodec.decode
// define, in float. One thread decodes one group of 16 elements. The entry is at the end.

#include "formats.h"
#include "arguments.h"

// Points of pairs by kind, in units of the vector's scale.
template <int KIND, int DIM, int BITS, int TERMS>
struct ExactPairs;

// params: coefficients of u, u^3, ..., TERMS of them.
template <int DIM, int BITS, int TERMS>
struct ExactPairs<POLYNOMIAL, DIM, BITS, TERMS> {
  static TQ_FUNC void decode(
      const thread GroupCodes<BITS>& codes, int p, const device float* params,
      thread float* pair) {
    constexpr uint CODE_MASK = (1u << BITS) - 1u;
    int index;
    uint word = pair_word<BITS>(codes, p, index);
    TQ_UNROLL
    for (int e = 0; e < 2; e++) {
      uint code = (word >> (BITS * index + 16 * e)) & CODE_MASK;
      float u = (float(code) - 0.5f * float(CODE_MASK)) / float(1u << BITS);
      float sum = params[TERMS - 1];
      TQ_UNROLL
      for (int i = TERMS - 2; i >= 0; i--) sum = sum * (u * u) + params[i];
      pair[e] = sum * u;
    }
  }
};

// params: the gain, then points (x, y) in units of it.
template <int DIM, int BITS, int TERMS>
struct ExactPairs<PAIRS, DIM, BITS, TERMS> {
  typedef Format<PAIRS, DIM, BITS, TERMS, true> F;
  static TQ_FUNC void decode(
      const thread typename F::Codes& codes, int p, const device float* params,
      thread float* pair) {
    const device float* point = params + 1 + 2 * F::code(codes, p);
    pair[0] = point[0] * params[0];
    pair[1] = point[1] * params[0];
  }
};

// params: the gain, then magnitudes (even, odd) in units of it.
template <int DIM, int BITS, int TERMS>
struct ExactPairs<TRELLIS, DIM, BITS, TERMS> {
  typedef Format<TRELLIS, DIM, BITS, TERMS, true> F;
  static TQ_FUNC void decode(
      const thread typename F::Codes& codes, int p, const device float* params,
      thread float* pair) {
    uint x = F::bits(codes, p);
    TQ_UNROLL
    for (int e = 0; e < 2; e++) {
      uint window = x >> (TERMS * e);
      float level = params[1u + 2u * (window & 127u) + uint(e)] * params[0];
      pair[e] = window & 128u ? -level : level;
    }
  }
};

// params: 1, then points (x, y) of the circle.
template <int DIM, int BITS, int TERMS>
struct ExactPairs<ANGLES, DIM, BITS, TERMS> {
  typedef Format<ANGLES, DIM, BITS, TERMS, true> F;
  static TQ_FUNC void decode(
      const thread typename F::Codes& codes, int p, const device float* params,
      thread float* pair) {
    const device float* point = params + 1 + 2 * F::Stream::code(codes.angles, p);
    pair[0] = point[0] * F::norm(codes, p);
    pair[1] = point[1] * F::norm(codes, p);
  }
};

// words and scales: of the vector; out: the vector.
template <int KIND, typename T, int DIM, int BITS, int TERMS>
TQ_FUNC void decode_group(
    const device uint* words, const device half* scales, const device float* params,
    uint group, device T* out) {
  typedef Format<KIND, DIM, BITS, TERMS, true> F;
  PackedTokens tokens = make_packed_tokens(words, scales);
  typename F::Cursor cursor = F::make_cursor(tokens, group, (DIM + 15) / 16);
  float scale = float(scales[0]);
  typename F::Codes codes = F::load(cursor, 0);
  TQ_UNROLL
  for (int p = 0; p < 8; p++) {
    float pair[2];
    ExactPairs<KIND, DIM, BITS, TERMS>::decode(codes, p, params, pair);
    int d = int(group) * 16 + 2 * p;
    if (d < DIM) out[d] = T(pair[0] * scale);
    if (d + 1 < DIM) out[d + 1] = T(pair[1] * scale);
  }
}

// Threads: one to a group of every vector, in the order (batch, head, token, group).
TQ_ENTRY(decode_codes) {
  DecodeArguments args = load_arguments(arguments);
  constexpr uint GROUPS = (DIM + 15) / 16;
  // 32 bits are enough to count threads, and GPUs divide them much faster than 64.
  uint index = threadgroup_position_in_grid.x * uint(THREADS) + thread_index_in_threadgroup;
  uint tokens = uint(args.tokens);
  uint vector = index / GROUPS;
  uint all_heads = vector / tokens;
  size_t token = vector - all_heads * tokens;
  size_t batch = all_heads / uint(args.kv_heads);
  size_t head = all_heads % uint(args.kv_heads);
  if (batch >= size_t(args.batch)) return;
  decode_group<KIND, T, DIM, BITS, TERMS>(
      words + batch * words_strides[0] + head * words_strides[1] + token * words_strides[2],
      scales + batch * scales_strides[0] + head * scales_strides[1] + token * scales_strides[2],
      params, index % GROUPS, out + size_t(vector) * DIM);
}
