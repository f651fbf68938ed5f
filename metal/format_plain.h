// Format of tokens that are not packed: elements of T as the model gave them, sink tokens
// and behind them recent ones. They are multiplied as halves, like all else.

#include "format.h"

// Those of one KV head; a token's elements are contiguous, and so are sink tokens.
template <typename T>
struct PlainTokens {
  const device T* sink;
  const device T* recent;
  int recent_stride;  // elements from a token to the next
  int sink_count;
  int count;  // of both, at least 1
};
template <typename T>
TQ_FUNC PlainTokens<T> make_plain_tokens(
    const device T* sink, int sink_count, const device T* recent, int recent_count,
    int recent_stride) {
  PlainTokens<T> tokens;
  tokens.sink = sink;
  tokens.recent = recent;
  tokens.recent_stride = recent_stride;
  tokens.sink_count = sink_count;
  tokens.count = sink_count + recent_count;
  return tokens;
}

// They lie in the order of the text.
template <typename T>
TQ_FUNC int place_of(const thread PlainTokens<T>&, int tile) { return tile; }
// Behind the last token it is the last: what lies there need not be a number.
template <int DIM, typename T>
TQ_FUNC const device T* vector_of(const thread PlainTokens<T>& tokens, int token) {
  if (token >= tokens.count) token = tokens.count - 1;
  int recent_token = token - tokens.sink_count;
  return recent_token < 0 ? tokens.sink + token * DIM
                          : tokens.recent + recent_token * tokens.recent_stride;
}

template <typename F, typename T>
TQ_FUNC void load_scales(const thread PlainTokens<T>&, int, uint, thread half2* pairs) {
  pairs[0] = pairs[1] = tq_splat(1.0f);
}
template <typename F, typename T>
TQ_FUNC void load_scales(const thread PlainTokens<T>&, int, uint, thread half* scale) {
  scale[0] = half(1.0f);
}

// COUNT elements of a vector from an address that is a multiple of as many, as halves, in
// their range. Halves are loaded four at a time.
TQ_FUNC float limit_to_halves(float x) { return tq_min(tq_max(x, -65504.0f), 65504.0f); }
template <int COUNT, typename T>
TQ_FUNC void load_halves(const device T* x, thread half2* pairs) {
  TQ_UNROLL
  for (int i = 0; i < COUNT / 2; i++) {
    pairs[i] = tq_half2(limit_to_halves(float(x[2 * i])), limit_to_halves(float(x[2 * i + 1])));
  }
}
template <int COUNT>
TQ_FUNC void load_halves(const device half* x, thread half2* pairs) {
  TQ_UNROLL
  for (int i = 0; i < COUNT / 4; i++) tq_load2(x + 4 * i, pairs + 2 * i);
}

// P: elements of the padded vector.
template <typename T, bool VALUES, int DIM, int P>
struct PlainFormat {
  enum {
    PADDED = P,
    LANE_WORDS = 0,
    TOKENS = VALUES ? 8 : 4,   // of a tile that a lane has elements of
    ELEMENTS = VALUES ? 4 : 8  // of a unit and token
  };
  struct Params {};
  struct Unit {
    half2 pairs[16];  // of elements, token by token
  };

  // Tokens: what `vector_of` finds vectors of T in.
  template <typename Tokens>
  static TQ_FUNC Unit load(
      const thread Tokens& tokens, int tile, int unit, int columns, uint lane) {
    int major = int(tq_major(lane));
    int minor = int(tq_minor(lane));
    int element = VALUES ? major * (P / 8) + 4 * unit : minor * (P / 4) + 8 * unit;
    Unit codes;
    TQ_UNROLL
    for (int i = 0; i < TOKENS; i++) {
      int of_eight = VALUES ? 2 * minor + i % 2 : major;
      int token = TILE_TOKENS * tile + 8 * (VALUES ? i / 2 : i) + of_eight;
      const device T* x = vector_of<DIM>(tokens, token);
      thread half2* pairs = codes.pairs + ELEMENTS / 2 * i;
      if (DIM == P && P % 32 == 0) {
        load_halves<ELEMENTS>(x + element, pairs);
      } else {
        TQ_UNROLL
        for (int k = 0; k < ELEMENTS / 2; k++) {
          bool is_column = k < columns / (VALUES ? 2 : 1);
          pairs[k] = is_column ? pair(x, element + 2 * k) : tq_splat(0.0f);
        }
      }
    }
    return codes;
  }
  static TQ_FUNC void decode(
      const thread Params&, const thread Unit& codes, int, int c, int j, thread half2* four) {
    TQ_UNROLL
    for (int i = 0; i < 2; i++) {
      if (VALUES) {
        uint first = tq_bits(codes.pairs[4 * (j + i) + c / 2]);
        uint second = tq_bits(codes.pairs[4 * (j + i) + 2 + c / 2]);
        four[2 * i] = tq_half2(tq_low_halves(first, second));
        four[2 * i + 1] = tq_half2(tq_high_halves(first, second));
      } else {
        four[2 * i] = codes.pairs[4 * (j + i) + c];
        four[2 * i + 1] = codes.pairs[4 * (j + i) + c + 1];
      }
    }
  }
  // Elements d, which is even, and d + 1; zero behind the vector's last.
  static TQ_FUNC half2 pair(const device T* x, int d) {
    float first = d < DIM ? float(x[d < DIM ? d : 0]) : 0.0f;
    float second = d + 1 < DIM ? float(x[d + 1 < DIM ? d + 1 : 0]) : 0.0f;
    return tq_half2(limit_to_halves(first), limit_to_halves(second));
  }
};
