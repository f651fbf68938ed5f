// How attention reads one side's codes. A `Format` hides which codec wrote them; each kind
// is a file of its own:
//
//   POLYNOMIAL  codes of coordinates: BITS each, levels by a polynomial of TERMS terms
//               (format_polynomial.h)
//   PAIRS       codes of pairs, BITS each, looked up in a table of points (format_points.h)
//   TRELLIS     codes of pairs, BITS each, TERMS of them the even element's; a level is
//               computed from the 8 bits from an element's own on (format_trellis.h)
//   ANGLES      as PAIRS, of points on a circle, and a norm of TERMS bits with each
//               (format_points.h)
//
// VALUES says which of the two ways tiles.h draws the tile is shared. A Format has
//
//   PADDED, LANE_WORDS, SCALES       elements of a padded vector, words that a lane has of a
//                                    tile, scales of a token
//   Params make_params(..)           what its levels are computed or looked up with
//   Unit load(tokens, tile, u, ..)   this lane's codes of unit u
//   decode(params, unit, columns, c, j, four)
//                                    the couples at (c, j), (c + 1, j), (c, j + 1) and
//                                    (c + 1, j + 1), of a unit of so many columns
//
// Levels are halves in units of a gain that the caller applies.

#include "tiles.h"

constant constexpr int POLYNOMIAL = 0;
constant constexpr int PAIRS = 1;
constant constexpr int TRELLIS = 2;
constant constexpr int ANGLES = 3;

template <int KIND, bool VALUES, int DIM, int BITS, int TERMS>
struct Format;

// Elements of a vector, filled up as its codec does: a trellis' circle has whole words of bits
// in its other order (mlx_turboquant/bitstream.py), 16 or 32 pairs at a time.
constexpr int tq_padded(int kind, int dim, int bits) {
  return kind != TRELLIS ? (dim + 15) / 16 * 16
         : bits % 2 == 0 ? (dim + 31) / 32 * 32
                         : (dim + 63) / 64 * 64;
}

// Words of a side's table in threadgroup memory; at least one, as arrays must have.
constexpr int tq_table_words(int kind, int bits) {
  return kind == PAIRS || kind == ANGLES ? 1 << bits : 1;
}

// params: the gain, then points (x, y) of pairs. table: tq_table_words of it, as halves.
template <int KIND, int BITS>
TQ_FUNC void load_table(
    const device float* params, threadgroup half2* table, uint thread_index, uint threads) {
  if (KIND != PAIRS && KIND != ANGLES) return;
  for (uint i = thread_index; i < uint(tq_table_words(KIND, BITS)); i += threads) {
    const device float* point = params + 1u + 2u * i;
    table[i] = tq_half2(point[0], point[1]);
  }
}

// What tokens of a tile are to be multiplied with apart from the gain: this lane's tokens
// 8 j + major, of j = 0, 1 and of j = 2, 3, or its token 8 minor + major.
template <typename F>
TQ_FUNC void load_scales(
    const thread PackedTokens& tokens, int tile, uint lane, thread half2* pairs) {
  tq_load2(tokens.scales + (tile * (32 * F::SCALES) + 4 * int(tq_major(lane))), pairs);
}
template <typename F>
TQ_FUNC void load_scales(
    const thread PackedTokens& tokens, int tile, uint lane, thread half* scale) {
  scale[0] = tokens.scales[tile * (32 * F::SCALES) + int(tq_slot(lane))];
}
