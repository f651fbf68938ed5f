// Codes of pairs of elements, CODE_BITS each: how the formats that look pairs up find them. A
// lane's codes are one stream of bits, unit after unit, in a unit the codes of one token
// together: those of its columns for keys, of every two columns for values, whose pairs are of
// two columns (mlx_turboquant/tiles.py).

#include "format.h"

template <bool VALUES, int P, int CODE_BITS>
struct PairCodes {
  enum {
    LANE_WORDS = (tq_columns(P) * 4 * CODE_BITS + 31) / 32,
    UNIT_WORDS = (CODE_BITS + 1) / 2  // that a unit has bits in: 16 codes
  };
  // A unit's codes from bit 0 on.
  struct Unit {
    uint words[UNIT_WORDS];
  };

  static TQ_FUNC Unit load(const thread PackedTokens& tokens, int tile, int unit, uint slot) {
    int first = CODE_BITS * unit / 2;
    const device uint* words = tokens.words + (tile * (32 * LANE_WORDS) + 32 * first + int(slot));
    Unit codes;
    TQ_UNROLL
    for (int i = 0; i < UNIT_WORDS; i++) {
      // A last unit of 2 columns is shorter.
      bool is_in_lane = P % 32 == 0 || first + i < LANE_WORDS;
      codes.words[i] = is_in_lane ? words[32 * i] : 0u;
    }
    if (CODE_BITS % 2 != 0) {
      TQ_UNROLL
      for (int i = 0; i < UNIT_WORDS; i++) {
        uint next = i + 1 < UNIT_WORDS ? codes.words[i + 1] : 0u;
        codes.words[i] = tq_funnel_half(codes.words[i], next, unit % 2 != 0);
      }
    }
    return codes;
  }
  // Number of the code of the pair that a couple belongs to: of keys at column c and token row
  // j; of values of columns c and c + 1 and of token h of the two of row j.
  static TQ_FUNC int index(int columns, int c, int j, int h) {
    return VALUES ? columns / 2 * (2 * j + h) + c / 2 : columns * j + c;
  }
  // The bits from code number `index` on, at least CODE_BITS of them and those behind it in a
  // word.
  static TQ_FUNC uint bits(const thread Unit& codes, int index) {
    int word = CODE_BITS * index / 32;
    int shift = CODE_BITS * index % 32;
    if (shift + CODE_BITS <= 32) return codes.words[word] >> shift;
    return tq_funnel(codes.words[word], codes.words[word + 1 < UNIT_WORDS ? word + 1 : word],
                     uint(shift));
  }
  static TQ_FUNC uint code(const thread Unit& codes, int index) {
    return bits(codes, index) & ((1u << CODE_BITS) - 1u);
  }
};

// Of the pairs of two tokens, a couple of their even elements and one of their odd ones.
TQ_FUNC void split_pairs(half2 a, half2 b, thread half2& even, thread half2& odd) {
  even = tq_half2(tq_low_halves(tq_bits(a), tq_bits(b)));
  odd = tq_half2(tq_high_halves(tq_bits(a), tq_bits(b)));
}
