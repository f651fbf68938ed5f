// How attention reads one side's codes. A `Format` hides which codec wrote them; each kind
// is a file of its own:
//
//   POLYNOMIAL  codes of coordinates: BITS each, levels by a polynomial of TERMS terms
//               (format_polynomial.h)
//   PAIRS       a stream of codes of pairs, BITS each, looked up in a table of points
//               (format_points.h)
//   TRELLIS     a stream of codes of pairs, BITS each, TERMS of them the even element's; a
//               level is looked up by the 8 bits from an element's own on (format_trellis.h)
//   ANGLES      as PAIRS, of points on a circle; behind the stream a norm of TERMS bits for
//               each pair (format_points.h)
//
// A vector is read in groups of 16 elements, 8 pairs. A Format has
//
//   WORDS, SCALES, LOAD_WORDS        words and scales of a vector, words that a load reads
//   DecodeParams make_params(..)     what its levels are computed or looked up with
//   Cursor make_cursor(tokens, ..)   where a group lies in the vector at hand
//   advance(cursor, tokens)          to the same group of a later vector
//   Codes load(cursor, tokens)       the codes of that group, `tokens` vectors on
//   half2 decode_pair(params, codes, p)                 pair p of one token
//   TokenPair make_token_pair(codes, codes)             the codes of two tokens, and
//   decode_even_odd(params, pair, p, even, odd)         their pair p by element
//
// Values are halves in units of a gain that the caller applies.

#include "compat/base.h"

constant constexpr int POLYNOMIAL = 0;
constant constexpr int PAIRS = 1;
constant constexpr int TRELLIS = 2;
constant constexpr int ANGLES = 3;

// SINGLE_TABLE: whether no other side's table is in threadgroup memory beside this one's.
template <int KIND, int DIM, int BITS, int TERMS, bool SINGLE_TABLE>
struct Format;

// The packed tokens of one KV head: WORDS words and SCALES scales each.
struct PackedTokens {
  const device uint* words;
  const device half* scales;
};
TQ_FUNC PackedTokens make_packed_tokens(const device uint* words, const device half* scales) {
  PackedTokens tokens;
  tokens.words = words;
  tokens.scales = scales;
  return tokens;
}
// What a token's decoded vector is to be multiplied with, apart from the gain.
template <typename F>
TQ_FUNC float token_scale(const thread PackedTokens& tokens, int token) {
  return float(tokens.scales[token * int(F::SCALES)]);
}

// A trellis has its 128 magnitudes once per lane (or, of two tables, per two lanes): lanes
// then never wait for each other's banks.
constexpr int tq_table_copies(bool single_table) { return single_table ? 32 : 16; }
// Words of a side's table in threadgroup memory; at least one, as arrays must have.
constexpr int tq_table_words(int kind, int bits, bool single_table) {
  return kind == PAIRS || kind == ANGLES ? 1 << bits
         : kind == TRELLIS               ? 128 * tq_table_copies(single_table)
                                         : 1;
}

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
