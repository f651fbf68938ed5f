// How codes lie for attention (mlx_turboquant/tiles.py defines it): 32 tokens of a head are a
// tile, shared by the 32 lanes of a simdgroup. A lane has of every tile COLUMNS columns of 4
// token rows j, and at each a couple of elements, the operand of a matrix product. With `major`
// 0..7 and `minor` 0..3 of the lane (compat/*/fragments.h) the couple at (column, j) is of
//
//     keys     token 8 j + major, elements 2 column, 2 column + 1 of the minor-th quarter
//     values   tokens 8 j + 2 minor, 8 j + 2 minor + 1, element `column` of the major-th eighth
//
// of the vector, padded. 4 columns are a unit, 16 couples. A tile's words are rows of 32, one
// word of each lane: word w of the lane with slot s = 4 major + minor is at 32 w + s. So loads
// of a simdgroup are whole lines, and addresses are a tile's begin and constants.

#include "compat/base.h"
#include "compat/fragments.h"

constant constexpr int TILE_TOKENS = 32;
constant constexpr int UNIT_COLUMNS = 4;

TQ_FUNC uint tq_slot(uint lane) { return 4u * tq_major(lane) + tq_minor(lane); }

// Of vectors of `padded` elements, a multiple of 16: columns of a lane, and units; the last
// unit may have 2 columns.
constexpr int tq_columns(int padded) { return padded / 8; }
constexpr int tq_units(int padded) { return (padded + 31) / 32; }

template <int PADDED>
TQ_FUNC int unit_columns(int unit) {
  return PADDED % 32 == 0 || unit < tq_units(PADDED) - 1 ? 4 : 2;
}

// The packed tokens of one KV head, of either side.
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

// Add a unit's part of the logits, not yet scaled: logits[8 * r + 2 * j + e] is of token row j
// and row 2 minor + e of row tile r. ROWS: token rows that count, the first 2 or all 4. query:
// the row tiles' fragments of the unit's 4 columns.
template <typename F, int ROW_TILES, int ROWS>
TQ_FUNC void add_unit_logits(
    const thread typename F::Params& params, const thread typename F::Unit& unit, int columns,
    const thread half2* query, thread float* logits) {
  TQ_UNROLL
  for (int c = 0; c < UNIT_COLUMNS; c += 2) {
    if (c >= columns) continue;
    TQ_UNROLL
    for (int j = 0; j < ROWS; j += 2) {
      half2 keys[4];
      F::decode(params, unit, columns, c, j, keys);
      TQ_UNROLL
      for (int r = 0; r < ROW_TILES; r++) {
        tq_logits_product(
            logits + 8 * r + 2 * j, query[4 * r + c], query[4 * r + c + 1], keys[0], keys[1],
            keys[2], keys[3]);
      }
    }
  }
}

// Add a unit's weighted values to sums[row_stride * r + 2 * c ..]: of row tile r and every two
// columns 4 floats, the first column's of rows 2 minor and 2 minor + 1, then the second's.
template <typename F, int ROW_TILES>
TQ_FUNC void add_unit_values(
    const thread typename F::Params& params, const thread typename F::Unit& unit, int columns,
    const thread half2* weights, thread float* sums, int row_stride) {
  TQ_UNROLL
  for (int c = 0; c < UNIT_COLUMNS; c += 2) {
    if (c >= columns) continue;
    TQ_UNROLL
    for (int j = 0; j < 4; j += 2) {
      half2 values[4];
      F::decode(params, unit, columns, c, j, values);
      TQ_UNROLL
      for (int r = 0; r < ROW_TILES; r++) {
        tq_values_product(
            sums + row_stride * r + 2 * c, values[0], values[1], values[2], values[3],
            weights[4 * r + j], weights[4 * r + j + 1]);
      }
    }
  }
}
