// A stream of codes of pairs, BITS each, low bits first in words and closed to a circle
// (mlx_turboquant/bitstream.py). A code may be looked up by more bits than its own, which
// are those of the pairs behind it:
//
//     word 0                               word 1      ..      word CIRCLE_WORDS - 1
//     | pair 0 | pair 1 | pair 2 | pair 3 |  ..             | last pair | -> pair 0
//     |<-BITS->|
//              |<-BITS + LOOKAHEAD->|  what pair 1 is looked up by
//
// A group's 8 pairs begin at a whole byte of some word.

#include "format.h"

struct StreamCursor {
  const device uint* words;  // the same for all lanes
  int first_word;            // that the group has bits in
  int last_word;             // that it reads; past the circle's end it is at its front
  uint shift;                // of the group's bits in the first word
};

// FILL_PAIRS: vectors are filled up to a multiple of it. NORM_WORDS: words of a vector
// behind its circle.
template <int DIM, int BITS, int LOOKAHEAD, int FILL_PAIRS, int NORM_WORDS>
struct PairStream {
  enum {
    FILLED_PAIRS = ((DIM + 1) / 2 + FILL_PAIRS - 1) / FILL_PAIRS * FILL_PAIRS,
    CIRCLE_WORDS = (FILLED_PAIRS * BITS + 31) / 32,
    WORDS = CIRCLE_WORDS + NORM_WORDS,
    SCALES = 1,
    SPAN_BITS = 8 * BITS + LOOKAHEAD,  // bits that a group's lookups see
    MAX_SHIFT = BITS % 4 == 0 ? 0 : BITS % 2 == 0 ? 16 : 24,
    LOAD_WORDS = (MAX_SHIFT + SPAN_BITS + 31) / 32,
    SPAN_WORDS = (SPAN_BITS + 31) / 32
  };
  typedef StreamCursor Cursor;
  // The span of a group, from bit 0 on.
  struct Codes {
    uint span[SPAN_WORDS];
  };

  static TQ_FUNC Cursor make_cursor(const thread PackedTokens& tokens, uint group, uint) {
    Cursor cursor;
    uint first_bit = 8u * BITS * group;
    cursor.words = tokens.words;
    cursor.first_word = int(first_bit / 32u);
    cursor.last_word = cursor.first_word + int(LOAD_WORDS) - 1;
    if (cursor.last_word >= int(CIRCLE_WORDS)) cursor.last_word -= int(CIRCLE_WORDS);
    cursor.shift = first_bit % 32u;
    return cursor;
  }
  static TQ_FUNC void advance(thread Cursor& cursor, int tokens) {
    cursor.first_word += tokens * int(WORDS);
    cursor.last_word += tokens * int(WORDS);
  }
  static TQ_FUNC Codes load(const thread Cursor& cursor, int tokens) {
    int offset = tokens * int(WORDS);
    uint raw[LOAD_WORDS];
    TQ_UNROLL
    for (int i = 0; i + 1 < LOAD_WORDS; i++) {
      raw[i] = cursor.words[cursor.first_word + offset + i];
    }
    raw[LOAD_WORDS - 1] = cursor.words[cursor.last_word + offset];
    Codes codes;
    TQ_UNROLL
    for (int i = 0; i < SPAN_WORDS; i++) {
      codes.span[i] = i + 1 < LOAD_WORDS ? tq_funnel(raw[i], raw[i + 1], cursor.shift)
                                         : raw[i] >> cursor.shift;
    }
    return codes;
  }
  // The bits from pair p's on, at least BITS + LOOKAHEAD of them.
  static TQ_FUNC uint bits(const thread Codes& codes, int p) {
    int word = BITS * p / 32;
    int shift = BITS * p % 32;
    if (shift + BITS + LOOKAHEAD <= 32) return codes.span[word] >> shift;
    int next = word + 1 < SPAN_WORDS ? word + 1 : word;
    return tq_funnel(codes.span[word], codes.span[next], uint(shift));
  }
  // Pair p's own bits.
  static TQ_FUNC uint code(const thread Codes& codes, int p) {
    return bits(codes, p) & ((1u << BITS) - 1u);
  }
};

// Formats of streams decode pairs of one token: of two tokens they keep both codes, and
// split the decoded pairs by element.
template <typename C>
struct StreamTokenPair {
  C first, second;
};
template <typename C>
TQ_FUNC StreamTokenPair<C> stream_token_pair(const thread C& a, const thread C& b) {
  StreamTokenPair<C> tokens;
  tokens.first = a;
  tokens.second = b;
  return tokens;
}
TQ_FUNC void split_pairs(half2 a, half2 b, thread half2& even, thread half2& odd) {
  even = tq_half2(tq_low_halves(tq_bits(a), tq_bits(b)));
  odd = tq_half2(tq_high_halves(tq_bits(a), tq_bits(b)));
}
