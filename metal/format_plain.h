// Format of tokens that are not packed: elements of T as the model gave them, sink tokens
// and behind them recent ones. They are multiplied as halves, like all else.

#include "format.h"
#include "arguments.h"

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
    const device T* sink, const device T* recent, int recent_stride,
    const thread AttendArguments& args) {
  PlainTokens<T> tokens;
  tokens.sink = sink;
  tokens.recent = recent;
  tokens.recent_stride = recent_stride;
  tokens.sink_count = args.sink;
  tokens.count = args.sink + args.recent;
  return tokens;
}
template <typename F, typename T>
TQ_FUNC float token_scale(const thread PlainTokens<T>&, int) {
  return 1.0f;
}

template <typename T, int DIM>
struct PlainFormat {
  enum { LOAD_WORDS = 8 };
  struct Cursor {
    PlainTokens<T> tokens;
    int token;
    int element;
  };
  struct Codes {
    half2 pairs[8];
  };
  struct DecodeParams {};
  struct TokenPair {
    Codes even, odd;
  };

  static TQ_FUNC Cursor make_cursor(const thread PlainTokens<T>& tokens, uint group, uint) {
    Cursor cursor;
    cursor.tokens = tokens;
    cursor.token = 0;
    cursor.element = 16 * int(group);
    return cursor;
  }
  static TQ_FUNC void advance(thread Cursor& cursor, int tokens) { cursor.token += tokens; }
  // Behind the last token it reads the last: what lies there need not be a number.
  static TQ_FUNC Codes load(const thread Cursor& cursor, int tokens) {
    int token = cursor.token + tokens;
    if (token >= cursor.tokens.count) token = cursor.tokens.count - 1;
    int recent_token = token - cursor.tokens.sink_count;
    const device T* x = recent_token < 0
                            ? cursor.tokens.sink + token * DIM
                            : cursor.tokens.recent + recent_token * cursor.tokens.recent_stride;
    Codes codes;
    TQ_UNROLL
    for (int p = 0; p < 8; p++) {
      int d = cursor.element + 2 * p;
      codes.pairs[p] = tq_half2(element(x, d), element(x, d + 1));
    }
    return codes;
  }
  // An element in the range of halves, zero behind the vector's last.
  static TQ_FUNC float element(const device T* x, int d) {
    if (DIM % 16 != 0 && d >= DIM) return 0.0f;
    return tq_min(tq_max(float(x[d]), -65504.0f), 65504.0f);
  }
  static TQ_FUNC half2 decode_pair(const thread DecodeParams&, const thread Codes& codes, int p) {
    return codes.pairs[p];
  }
  static TQ_FUNC TokenPair make_token_pair(const thread Codes& a, const thread Codes& b) {
    TokenPair tokens;
    TQ_UNROLL
    for (int p = 0; p < 8; p++) {
      uint first = tq_bits(a.pairs[p]);
      uint second = tq_bits(b.pairs[p]);
      tokens.even.pairs[p] = tq_half2(tq_low_halves(first, second));
      tokens.odd.pairs[p] = tq_half2(tq_high_halves(first, second));
    }
    return tokens;
  }
  static TQ_FUNC void decode_even_odd(
      const thread DecodeParams&, const thread TokenPair& tokens, int p, thread half2& even,
      thread half2& odd) {
    even = tokens.even.pairs[p];
    odd = tokens.odd.pairs[p];
  }
};
