// Codes from vector order, as codecs and encoders write them (mlx_turboquant/packing.py,
// bitstream.py), to tile order (tile_codes.h). A threadgroup takes a tile of a head: it
// unpacks its tokens' codes, then gathers every word. The entry is at the end.

#include "packing.h"
#include "tile_codes.h"
#include "arguments.h"

// Unpacked, a pair is a ushort: its code, or those of its two elements, the odd one's in the
// high byte. word: has these at bit 0 of each half.
template <int BITS>
TQ_FUNC uint element_pair(uint word) {
  constexpr uint CODE_MASK = (1u << BITS) - 1u;
  return (word & CODE_MASK) | (((word >> 16) & CODE_MASK) << 8);
}

// Unpacks the 8 pairs of a group of 16 elements. Here of a vector that is a stream of codes, with
// one of norms behind it (ANGLES).
template <int KIND, int DIM, int BITS, int TERMS>
struct VectorOrder {
  enum {
    FILLED_PAIRS = TileOrder<KIND, DIM, BITS, TERMS, false>::FILLED_PAIRS,
    NORM_BITS = KIND == ANGLES ? TERMS : 1,
    CIRCLE_WORDS = (FILLED_PAIRS * BITS + 31) / 32,
    WORDS = CIRCLE_WORDS + (KIND == ANGLES ? FILLED_PAIRS * TERMS / 32 : 0)
  };

  static TQ_FUNC void unpack(const device uint* words, uint group, threadgroup ushort* pairs) {
    TQ_UNROLL
    for (int p = 0; p < 8; p++) {
      uint code = stream_code<BITS, 1>(words, 8u * group + uint(p));
      if (KIND == ANGLES) {
        code |= stream_code<NORM_BITS, 1>(words + CIRCLE_WORDS, 8u * group + uint(p)) << BITS;
      }
      pairs[p] = ushort(code);
    }
  }
};
// And of codes of elements, whose groups and fields packing.h draws.
template <int DIM, int BITS, int TERMS>
struct VectorOrder<POLYNOMIAL, DIM, BITS, TERMS> {
  enum { WORDS = tq_words(DIM, BITS), GROUPS = (DIM + 15) / 16, OWN = BITS / 2 };

  static TQ_FUNC void unpack(const device uint* words, uint group, threadgroup ushort* pairs) {
    bool is_second = group % 2u != 0u;
    const device uint* chunk = words + group / 2u * uint(BITS);
    uint fields[OWN + 1];
    TQ_UNROLL
    for (int i = 0; i < OWN; i++) fields[i] = chunk[(is_second ? OWN : 0) + i];
    if (BITS % 2 != 0) {
      bool has_no_neighbour = !is_second && group + 1u == uint(GROUPS);
      fields[OWN] = tq_shift_byte(chunk[has_no_neighbour ? OWN : 2 * OWN], is_second);
    }
    int p = 0;
    int spare_count = 0;
    uint spare_bits = 0u;
    TQ_UNROLL
    for (int i = 0; i < OWN + BITS % 2; i++) {
      int width = i < OWN ? 16 : 8;
      TQ_UNROLL
      for (int f = 0; f < width / BITS; f++) {
        pairs[p++] = ushort(element_pair<BITS>(fields[i] >> (BITS * f)));
      }
      uint spare_mask = ((1u << (width % BITS)) - 1u) * 0x00010001u;
      spare_bits |= ((fields[i] >> (width / BITS * BITS)) & spare_mask) << spare_count;
      spare_count += width % BITS;
    }
    for (int f = 0; p < 8; f++) {
      pairs[p++] = ushort(element_pair<BITS>(spare_bits >> (BITS * f)));
    }
  }
};

// The words of a unit of COUPLES couples of elements: codes of BITS in each half.
template <int BITS, int COUPLES>
struct UnitWords {
  enum {
    COUNT = (COUPLES * BITS + 15) / 16,
    FIELDS = 16 / BITS,  // whole codes of a half
    SPARE = 16 % BITS,   // bits that they leave
    FITTING = FIELDS * COUNT
  };
  // The bit of a half that a field begins at, and that is its spare one number `place`.
  static TQ_FUNC int field_at(int field) { return (SPARE > 0 ? 1 : 0) + BITS * field; }
  static TQ_FUNC int spare_at(int place) { return place == 0 ? 0 : field_at(FIELDS) + place - 1; }
};

// Gathers a word of a slot. codes: FILLED_PAIRS of every token. Here of a stream.
template <int KIND, int DIM, int BITS, int TERMS, bool VALUES>
struct GatheredWord {
  typedef TileOrder<KIND, DIM, BITS, TERMS, VALUES> Order;

  static TQ_FUNC uint gather(const threadgroup ushort* codes, uint slot, uint word) {
    uint gathered = 0u;
    PairPlace place;
    place.slot = slot;
    place.number = 32u * word / uint(Order::CODE_BITS);
    for (; place.number < uint(Order::FILLED_PAIRS); place.number++) {
      int at = int(place.number) * int(Order::CODE_BITS) - 32 * int(word);
      if (at >= 32) break;
      TilePair pair = Order::pair_at(place);
      uint code = codes[pair.token * uint(Order::FILLED_PAIRS) + pair.pair];
      gathered |= at < 0 ? code >> -at : code << at;
    }
    return gathered;
  }
};
// And of units of couples of elements.
template <int DIM, int BITS, int TERMS, bool VALUES>
struct GatheredWord<POLYNOMIAL, DIM, BITS, TERMS, VALUES> {
  typedef TileOrder<POLYNOMIAL, DIM, BITS, TERMS, VALUES> Order;

  static TQ_FUNC uint gather(const threadgroup ushort* codes, uint slot, uint word) {
    uint unit = word / uint(BITS);
    int word_of_unit = int(word % uint(BITS));
    if (Order::HAS_HALF_UNIT && unit + 1u == uint(Order::UNITS)) {
      return gather_of_unit<8>(codes, slot, unit, word_of_unit);
    }
    return gather_of_unit<16>(codes, slot, unit, word_of_unit);
  }
  template <int COUPLES>
  static TQ_FUNC uint gather_of_unit(
      const threadgroup ushort* codes, uint slot, uint unit, int word) {
    typedef UnitWords<BITS, COUPLES> Unit;
    uint gathered = 0u;
    for (int f = 0; f < int(Unit::FIELDS); f++) {
      int couple = int(Unit::FIELDS) * word + f;
      if (couple >= COUPLES) break;
      gathered |= couple_codes(codes, slot, unit, couple) << Unit::field_at(f);
    }
    for (int place = 0; place < int(Unit::SPARE); place++) {
      int bit = int(Unit::SPARE) * word + place;
      int couple = int(Unit::FITTING) + bit / BITS;
      if (couple >= COUPLES) break;
      uint bits = couple_codes(codes, slot, unit, couple) >> (bit % BITS);
      gathered |= (bits & 0x00010001u) << Unit::spare_at(place);
    }
    return gathered;
  }
  // Low and high code of a couple, in halves.
  static TQ_FUNC uint couple_codes(
      const threadgroup ushort* codes, uint slot, uint unit, int couple) {
    uint column = 4u * unit + uint(couple) / 4u;
    uint row = uint(couple) % 4u;
    if (!VALUES) {
      uint token = Order::slot_token(slot, row);
      uint pair = codes[token * uint(Order::FILLED_PAIRS) + Order::first_pair(slot) + column];
      return (pair & 255u) | ((pair >> 8) << 16);
    }
    uint element = slot / 4u * uint(Order::COLUMNS) + column;
    uint token = Order::slot_token(slot, 2u * row);
    const threadgroup ushort* low = codes + token * uint(Order::FILLED_PAIRS) + element / 2u;
    uint shift = 8u * (element % 2u);
    uint low_code = (uint(low[0]) >> shift) & 255u;
    return low_code | (((uint(low[Order::FILLED_PAIRS]) >> shift) & 255u) << 16);
  }
};

// from_words, from_scales: of the tile's first token, of `tokens` that it has; to_words,
// to_scales: the tile. codes: FILLED_PAIRS of TILE_TOKENS tokens.
template <int KIND, int DIM, int BITS, int TERMS, bool VALUES, int THREADS>
TQ_FUNC void order_tile(
    const device uint* from_words, const device half* from_scales, uint tokens,
    threadgroup ushort* codes, uint thread_index, device uint* to_words,
    device half* to_scales) {
  typedef VectorOrder<KIND, DIM, BITS, TERMS> Vector;
  typedef TileOrder<KIND, DIM, BITS, TERMS, VALUES> Order;
  constexpr uint GROUPS = uint(Order::FILLED_PAIRS) / 8u;
  for (uint i = thread_index; i < uint(TILE_TOKENS) * GROUPS; i += uint(THREADS)) {
    uint token = i / GROUPS;
    uint group = i % GROUPS;
    threadgroup ushort* pairs = codes + 8u * i;
    if (token < tokens) {
      Vector::unpack(from_words + token * uint(Vector::WORDS), group, pairs);
    } else {
      TQ_UNROLL
      for (int p = 0; p < 8; p++) pairs[p] = ushort(0);
    }
  }
  for (uint i = thread_index; i < uint(TILE_TOKENS * Order::SCALES); i += uint(THREADS)) {
    uint token = i / uint(Order::SCALES);
    uint scale = i % uint(Order::SCALES);
    to_scales[uint(TILE_TOKENS) * scale + Order::scale_at(token)] =
        token < tokens ? from_scales[i] : half(0.0f);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < uint(Order::WORDS); i += uint(THREADS)) {
    to_words[i] = GatheredWord<KIND, DIM, BITS, TERMS, VALUES>::gather(
        codes, i % uint(TILE_TOKENS), i / uint(TILE_TOKENS));
  }
}

// Threadgroups: one to a tile of every head, in the order (batch, head, tile).
TQ_ENTRY(order_codes) {
  typedef TileOrder<KIND, DIM, BITS, TERMS, VALUES> Order;
  threadgroup ushort codes[TILE_TOKENS * Order::FILLED_PAIRS];
  OrderArguments args = load_arguments(arguments);
  uint tokens = uint(args.tokens);
  uint tiles = (tokens + uint(TILE_TOKENS) - 1u) / uint(TILE_TOKENS);
  size_t index = threadgroup_position_in_grid.x;
  uint first = uint(TILE_TOKENS) * (threadgroup_position_in_grid.x % tiles);
  size_t vector = size_t(threadgroup_position_in_grid.x / tiles) * tokens + first;
  order_tile<KIND, DIM, BITS, TERMS, VALUES, THREADS>(
      words + vector * VectorOrder<KIND, DIM, BITS, TERMS>::WORDS,
      scales + vector * Order::SCALES, tq_min(uint(TILE_TOKENS), tokens - first), codes,
      thread_index_in_threadgroup, tile_words + index * Order::WORDS,
      tile_scales + index * (TILE_TOKENS * Order::SCALES));
}
