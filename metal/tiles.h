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

// The packed tokens of one KV head, of either side: tile number i of the text is number tiles[i]
// of those in the buffers, its *place*. What decodes takes places.
struct PackedTokens {
  const device uint* words;
  const device half* scales;
  const device int* tiles;
};
TQ_FUNC PackedTokens make_packed_tokens(
    const device uint* words, const device half* scales, const device int* tiles) {
  PackedTokens tokens;
  tokens.words = words;
  tokens.scales = scales;
  tokens.tiles = tiles;
  return tokens;
}
TQ_FUNC int place_of(const thread PackedTokens& tokens, int tile) { return tokens.tiles[tile]; }

// Places of the tiles of a round, one of each simdgroup, from tile number `first` on; behind the
// last tile it is that. A simdgroup has them in its lanes, so that they take one register.
template <int SIMDGROUPS, typename Tokens>
TQ_FUNC int load_places(const thread Tokens& tokens, int first, int end, uint lane) {
  return place_of(tokens, tq_min(first + int(lane % uint(SIMDGROUPS)), end - 1));
}
TQ_FUNC int nth_place(int places, uint n) {
  return int(simd_shuffle(uint(places), ushort(n)));
}
