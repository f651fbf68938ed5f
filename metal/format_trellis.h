// Format TRELLIS: a level is looked up by a window of 8 bits of the stream of a vector's codes.
// With x the bits from a pair's own on, the windows of its two elements overlap:
//
//     bit of x     TERMS + 7 | TERMS + 6  ..  8 | 7      | 6  ..  TERMS | TERMS - 1  ..  0
//     even element                              | sign   | index of its magnitude
//     odd element  sign      | index of its magnitude                   |
//
// The stream goes on in the next unit of the lane, and behind its last one in the first of the
// lane that has the next part of the vector; behind the last element is the first.
// A word of the table has an even element's magnitude in its low half, an odd one's in its
// high half.

#include "pair_codes.h"

template <bool VALUES, int DIM, int BITS, int TERMS, bool SINGLE_TABLE>
struct Format<TRELLIS, VALUES, DIM, BITS, TERMS, SINGLE_TABLE> {
  typedef PairCodes<VALUES, tq_padded(TRELLIS, DIM, BITS), BITS> Codes;
  enum {
    PADDED = tq_padded(TRELLIS, DIM, BITS),
    LANE_WORDS = Codes::LANE_WORDS,
    SCALES = 1,
    UNITS = tq_units(PADDED),
    COPIES = tq_table_copies(SINGLE_TABLE),
    COPY_BITS = SINGLE_TABLE ? 5 : 4,
    LOOKAHEAD = TERMS + 8 - BITS,  // bits that a window needs behind its pair's own
    RUN = VALUES ? 2 : 4,          // a token's codes in a unit
    NEXT_UNITS = (LOOKAHEAD + RUN * BITS - 1) / (RUN * BITS)  // that windows reach into
  };
  struct Unit {
    typename Codes::Unit codes;
    typename Codes::Unit next[NEXT_UNITS];
  };
  struct Params {
    const threadgroup half2* table;
    uint copy;  // the one that this lane reads
  };

  static TQ_FUNC Params make_params(
      const device float*, const threadgroup half2* table, uint lane) {
    Params params;
    params.table = table;
    params.copy = lane % uint(COPIES);
    return params;
  }
  static TQ_FUNC Unit load(
      const thread PackedTokens& tokens, int tile, int unit, int, uint lane) {
    Unit codes;
    uint slot = tq_slot(lane);
    codes.codes = Codes::load(tokens, tile, unit, slot);
    TQ_UNROLL
    for (int i = 0; i < NEXT_UNITS; i++) {
      if (++unit == UNITS) {
        unit = 0;
        slot = VALUES ? (slot + 4u) % 32u : slot / 4u * 4u + (slot + 1u) % 4u;
      }
      codes.next[i] = Codes::load(tokens, tile, unit, slot);
    }
    return codes;
  }
  // The bits from the pair's on, as many as its windows see.
  static TQ_FUNC uint window_bits(const thread Unit& codes, int c, int j, int h) {
    int index = Codes::index(UNIT_COLUMNS, c, j, h);
    int own = BITS * (RUN - index % RUN);  // bits of the run from the pair's on
    int shift = BITS * index % 32;
    uint x;
    if (shift + (own < BITS + LOOKAHEAD ? own : BITS + LOOKAHEAD) <= 32) {
      x = codes.codes.words[BITS * index / 32] >> shift;
    } else {
      x = tq_funnel(
          codes.codes.words[BITS * index / 32], codes.codes.words[BITS * index / 32 + 1],
          uint(shift));
    }
    TQ_UNROLL
    for (int i = 0; i < NEXT_UNITS; i++) {
      int at = own + RUN * BITS * i;
      if (at >= BITS + LOOKAHEAD) continue;
      int first = BITS * (index - index % RUN);
      uint run = codes.next[i].words[first / 32] >> (first % 32);
      if (first % 32 + RUN * BITS > 32) {
        run = tq_funnel(
            codes.next[i].words[first / 32], codes.next[i].words[first / 32 + 1],
            uint(first % 32));
      }
      x = tq_and_or(x, (1u << at) - 1u, run << at);
    }
    return x;
  }
  // The magnitudes by the 7 bits from bit `at` of x on.
  static TQ_FUNC uint lookup(const thread Params& params, uint x, int at) {
    uint shifted = at >= COPY_BITS ? x >> (at - COPY_BITS) : x << (COPY_BITS - at);
    return tq_bits(params.table[tq_and_or(shifted, 127u << COPY_BITS, params.copy)]);
  }
  // An even and an odd element of one pair.
  static TQ_FUNC half2 pair_levels(const thread Params& params, uint x) {
    uint levels = tq_outer_halves(lookup(params, x, 0), lookup(params, x, TERMS));
    // Signs are the windows' top bits.
    levels ^= (x << 8) & 0x8000u;
    return tq_half2(levels ^ ((x << (24 - TERMS)) & 0x80000000u));
  }
  // Even and odd elements of the pairs of two tokens.
  static TQ_FUNC void even_odd_levels(
      const thread Params& params, uint x, uint y, thread half2& even, thread half2& odd) {
    uint evens = tq_low_halves(lookup(params, x, 0), lookup(params, y, 0));
    uint odds = tq_high_halves(lookup(params, x, TERMS), lookup(params, y, TERMS));
    uint signs = tq_low_halves(x, y);
    even = tq_half2(evens ^ ((signs << 8) & 0x80008000u));
    odd = tq_half2(odds ^ ((signs << (8 - TERMS)) & 0x80008000u));
  }
  static TQ_FUNC void decode(
      const thread Params& params, const thread Unit& codes, int, int c, int j,
      thread half2* four) {
    TQ_UNROLL
    for (int i = 0; i < 2; i++) {
      uint x = window_bits(codes, c, j + i, 0);
      uint y = window_bits(codes, c + (VALUES ? 0 : 1), j + i, VALUES ? 1 : 0);
      if (VALUES) {
        even_odd_levels(params, x, y, four[2 * i], four[2 * i + 1]);
      } else {
        four[2 * i] = pair_levels(params, x);
        four[2 * i + 1] = pair_levels(params, y);
      }
    }
  }
};
