// Codes in tile order to rotated vectors, for prefill: what ScalarCodec.decode,
// TableCodec.decode and TurboAngle.decode define, in float. One thread decodes a unit of a
// slot (tile_codes.h): of keys 8 elements of 4 tokens, of values 4 elements of 8 tokens; half
// of them in a last unit of two columns. The entry is at the end.

#include "tile_codes.h"
#include "unit_codes.h"
#include "arguments.h"

// A unit's share of a tile: where its codes come from, and its vectors go.
template <typename T>
struct UnitTask {
  const device uint* tile;    // its words
  const device half* scales;
  device T* out;              // the vector of the tile's first token
  uint tokens;                // that the tile has
  uint slot, unit;
};
// Element d of a token, unless it is padding.
template <int DIM, int FILLED_PAIRS, typename T>
TQ_FUNC void write_element(const thread UnitTask<T>& task, uint token, uint d, float value) {
  if (2 * FILLED_PAIRS == DIM || d < uint(DIM)) task.out[token * uint(DIM) + d] = T(value);
}

// The level of a code of BITS.
template <int BITS, int TERMS>
TQ_FUNC float exact_level(const thread float* coefficients, uint code) {
  float u = (float(code) - 0.5f * float((1u << BITS) - 1u)) / float(1u << BITS);
  float sum = coefficients[TERMS - 1];
  TQ_UNROLL
  for (int i = TERMS - 2; i >= 0; i--) sum = sum * (u * u) + coefficients[i];
  return sum * u;
}

// Points of pairs by what they are looked up by, in units of the token's scale.
template <int KIND, int BITS, int TERMS>
struct ExactPairs;

// params: the gain, then points (x, y) in units of it.
template <int BITS, int TERMS>
struct ExactPairs<PAIRS, BITS, TERMS> {
  static TQ_FUNC void decode(uint code, const device float* params, float, thread float* pair) {
    const device float* point = params + 1 + 2 * code;
    pair[0] = point[0] * params[0];
    pair[1] = point[1] * params[0];
  }
};

// params: the gain, then magnitudes (even, odd) in units of it.
template <int BITS, int TERMS>
struct ExactPairs<TRELLIS, BITS, TERMS> {
  static TQ_FUNC void decode(uint x, const device float* params, float, thread float* pair) {
    TQ_UNROLL
    for (int e = 0; e < 2; e++) {
      uint window = x >> (TERMS * e);
      float level = params[1u + 2u * (window & 127u) + uint(e)] * params[0];
      pair[e] = window & 128u ? -level : level;
    }
  }
};

// params: 1, then points (x, y) of the circle. norm_range: the token's second scale, which says
// how far below its largest norm the others reach: the least over the largest (8 bits, linear),
// or log(largest / least) (4 bits, logarithmic).
template <int BITS, int TERMS>
struct ExactPairs<ANGLES, BITS, TERMS> {
  static TQ_FUNC void decode(
      uint code, const device float* params, float norm_range, thread float* pair) {
    const device float* point = params + 1 + 2 * (code & ((1u << BITS) - 1u));
    float fraction = float(code >> BITS) / float((1u << TERMS) - 1u);
    float norm = TERMS == 8 ? norm_range + (1.0f - norm_range) * fraction
                            : tq_exp2(norm_range * (fraction - 1.0f) * 1.44269504f);
    pair[0] = point[0] * norm;
    pair[1] = point[1] * norm;
  }
};

template <int KIND, typename T, int DIM, int BITS, int TERMS, bool VALUES>
struct UnitDecoder {
  typedef TileOrder<KIND, DIM, BITS, TERMS, VALUES> Order;
  // Pairs behind a run whose bits its last pair is looked up by, too.
  enum {
    FOLLOWING = KIND == TRELLIS ? (TERMS + 7) / BITS : 0,
    READ_PAIRS = Order::RUN_PAIRS + FOLLOWING
  };

  static TQ_FUNC void decode(const thread UnitTask<T>& task, const device float* params) {
    uint run = Order::run_of(task.unit);
    uint first = Order::first_pair(task.slot) + uint(Order::RUN_PAIRS) * task.unit;
    TQ_UNROLL
    for (int row = 0; row < int(Order::SLOT_TOKENS); row++) {
      uint token = Order::slot_token(task.slot, uint(row));
      if (token >= task.tokens) break;
      const device half* scales = task.scales + Order::scale_at(token);
      float scale = float(scales[0]);
      float norm_range = KIND == ANGLES ? float(scales[TILE_TOKENS]) : 0.0f;
      uint codes[READ_PAIRS];
      TQ_UNROLL
      for (int i = 0; i < int(READ_PAIRS); i++) codes[i] = code_of(task, token, first + uint(i));
      TQ_UNROLL
      for (int i = 0; i < int(Order::RUN_PAIRS); i++) {
        if (uint(i) >= run) break;
        uint bits = codes[i];
        TQ_UNROLL
        for (int f = 1; f <= int(FOLLOWING); f++) bits |= codes[i + f] << (BITS * f);
        float pair[2];
        ExactPairs<KIND, BITS, TERMS>::decode(bits, params, norm_range, pair);
        TQ_UNROLL
        for (int e = 0; e < 2; e++) {
          uint d = 2u * (first + uint(i)) + uint(e);
          write_element<DIM, Order::FILLED_PAIRS>(task, token, d, pair[e] * scale);
        }
      }
    }
  }
  // Behind the last pair the first follows. What follows a run may be another slot's.
  static TQ_FUNC uint code_of(const thread UnitTask<T>& task, uint token, uint pair) {
    TilePair at;
    at.token = token;
    at.pair = pair < uint(Order::FILLED_PAIRS) ? pair : pair - uint(Order::FILLED_PAIRS);
    PairPlace place = Order::place_of(at);
    return stream_code<Order::CODE_BITS, TILE_TOKENS>(task.tile + place.slot, place.number);
  }
};
// params: coefficients of u, u^3, ..., TERMS of them.
template <typename T, int DIM, int BITS, int TERMS, bool VALUES>
struct UnitDecoder<POLYNOMIAL, T, DIM, BITS, TERMS, VALUES> {
  typedef TileOrder<POLYNOMIAL, DIM, BITS, TERMS, VALUES> Order;

  static TQ_FUNC void decode(const thread UnitTask<T>& task, const device float* params) {
    float coefficients[TERMS];
    TQ_UNROLL
    for (int i = 0; i < TERMS; i++) coefficients[i] = params[i];
    if (Order::HAS_HALF_UNIT && task.unit + 1u == uint(Order::UNITS)) {
      decode_columns<2>(task, coefficients);
    } else {
      decode_columns<4>(task, coefficients);
    }
  }
  template <int WIDTH>
  static TQ_FUNC void decode_columns(
      const thread UnitTask<T>& task, const thread float* coefficients) {
    constexpr uint CODE_MASK = (1u << BITS) - 1u;
    constexpr int COUNT = tq_unit_words(BITS, WIDTH);
    uint words[COUNT];
    TQ_UNROLL
    for (int i = 0; i < COUNT; i++) {
      words[i] = task.tile[uint(TILE_TOKENS) * (task.unit * uint(BITS) + uint(i)) + task.slot];
    }
    uint first_column = 4u * task.unit;
    TQ_UNROLL
    for (int row = 0; row < 4; row++) {
      // Tokens of low and of high codes.
      uint token[2];
      float scale[2];
      TQ_UNROLL
      for (int e = 0; e < 2; e++) {
        token[e] = Order::slot_token(task.slot, uint(VALUES ? 2 * row + e : row));
        scale[e] = float(task.scales[Order::scale_at(token[e])]);
      }
      TQ_UNROLL
      for (int c = 0; c < WIDTH; c++) {
        int low_bit;
        uint codes = couple_bits<BITS>(words, WIDTH, 4 * c + row, low_bit) >> low_bit;
        uint column = first_column + uint(c);
        TQ_UNROLL
        for (int e = 0; e < 2; e++) {
          uint d = VALUES ? task.slot / 4u * uint(Order::COLUMNS) + column
                          : 2u * (Order::first_pair(task.slot) + column) + uint(e);
          uint code = (codes >> (16 * e)) & CODE_MASK;
          float level = exact_level<BITS, TERMS>(coefficients, code);
          if (token[e] < task.tokens) {
            write_element<DIM, Order::FILLED_PAIRS>(task, token[e], d, level * scale[e]);
          }
        }
      }
    }
  }
};

// Threads: one to a unit of every slot, in the order (batch, head, tile, slot, unit): then
// what a simdgroup reads at once are whole lines of 8 slots, and what it writes lies together.
TQ_ENTRY(decode_codes) {
  typedef TileOrder<KIND, DIM, BITS, TERMS, VALUES> Order;
  DecodeArguments args = load_arguments(arguments);
  // 32 bits are enough to count threads, and GPUs divide them much faster than 64.
  uint index = threadgroup_position_in_grid.x * uint(THREADS) + thread_index_in_threadgroup;
  uint tokens = uint(args.tokens);
  uint tiles = (tokens + uint(TILE_TOKENS) - 1u) / uint(TILE_TOKENS);
  uint slots = index / uint(Order::UNITS);
  uint all_heads = slots / uint(TILE_TOKENS) / tiles;
  size_t tile = slots / uint(TILE_TOKENS) % tiles;
  size_t batch = all_heads / uint(args.kv_heads);
  size_t head = all_heads % uint(args.kv_heads);
  if (batch >= size_t(args.batch)) return;
  uint first_token = uint(TILE_TOKENS) * uint(tile);
  UnitTask<T> task;
  task.tile = words + batch * words_strides[0] + head * words_strides[1]
              + tile * words_strides[2];
  task.scales = scales + batch * scales_strides[0] + head * scales_strides[1]
                + tile * scales_strides[2];
  task.out = out + (size_t(all_heads) * tokens + first_token) * DIM;
  task.tokens = tq_min(uint(TILE_TOKENS), tokens - first_token);
  task.slot = slots % uint(TILE_TOKENS);
  task.unit = index % uint(Order::UNITS);
  UnitDecoder<KIND, T, DIM, BITS, TERMS, VALUES>::decode(task, params);
}
