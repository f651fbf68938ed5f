// Format TRELLIS: a level is looked up by a window of 8 bits of the stream. With x the bits
// from pair p's on, the windows of its two elements overlap:
//
//     bit of x     TERMS + 7 | TERMS + 6  ..  8 | 7      | 6  ..  TERMS | TERMS - 1  ..  0
//     even element                              | sign   | index of its magnitude
//     odd element  sign      | index of its magnitude                   |
//
// A word of the table has an even element's magnitude in its low half, an odd one's in its
// high half.

#include "pair_stream.h"

template <int DIM, int BITS, int TERMS, bool SINGLE_TABLE>
struct Format<TRELLIS, DIM, BITS, TERMS, SINGLE_TABLE>
    : PairStream<DIM, BITS, TERMS + 8 - BITS, BITS % 2 == 0 ? 16 : 32, 0> {
  typedef PairStream<DIM, BITS, TERMS + 8 - BITS, BITS % 2 == 0 ? 16 : 32, 0> Stream;
  typedef typename Stream::Codes Codes;
  typedef StreamTokenPair<Codes> TokenPair;
  enum { COPIES = tq_table_copies(SINGLE_TABLE), COPY_BITS = SINGLE_TABLE ? 5 : 4 };
  struct DecodeParams {
    const threadgroup half2* table;
    uint copy;  // the one that this lane reads
  };

  static TQ_FUNC DecodeParams make_params(
      const device float*, const threadgroup half2* table, uint lane) {
    DecodeParams params;
    params.table = table;
    params.copy = lane % uint(COPIES);
    return params;
  }
  // The magnitudes by the 7 bits from bit `at` of x on.
  static TQ_FUNC uint lookup(const thread DecodeParams& params, uint x, int at) {
    uint shifted = at >= COPY_BITS ? x >> (at - COPY_BITS) : x << (COPY_BITS - at);
    return tq_bits(params.table[tq_and_or(shifted, 127u << COPY_BITS, params.copy)]);
  }
  static TQ_FUNC half2 decode_pair(
      const thread DecodeParams& params, const thread Codes& codes, int p) {
    uint x = Stream::bits(codes, p);
    uint levels = tq_outer_halves(lookup(params, x, 0), lookup(params, x, TERMS));
    // Signs are the windows' top bits.
    levels ^= (x << 8) & 0x8000u;
    return tq_half2(levels ^ ((x << (24 - TERMS)) & 0x80000000u));
  }
  static TQ_FUNC TokenPair make_token_pair(const thread Codes& a, const thread Codes& b) {
    return stream_token_pair<Codes>(a, b);
  }
  static TQ_FUNC void decode_even_odd(
      const thread DecodeParams& params, const thread TokenPair& tokens, int p,
      thread half2& even, thread half2& odd) {
    uint x = Stream::bits(tokens.first, p);
    uint y = Stream::bits(tokens.second, p);
    uint evens = tq_low_halves(lookup(params, x, 0), lookup(params, y, 0));
    uint odds = tq_high_halves(lookup(params, x, TERMS), lookup(params, y, TERMS));
    uint signs = tq_low_halves(x, y);
    even = tq_half2(evens ^ ((signs << 8) & 0x80008000u));
    odd = tq_half2(odds ^ ((signs << (8 - TERMS)) & 0x80008000u));
  }
};
