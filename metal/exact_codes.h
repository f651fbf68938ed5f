// Codes in tile order to vectors in the codes' basis, in float: what ScalarCodec.decode,
// TableCodec.decode and TurboAngle.decode define. A thread decodes a unit of a slot
// (tile_codes.h): of keys 8 elements of 4 tokens, of values 4 elements of 8 tokens; half of them
// in a last unit of two columns. The elements of a token lie together: they are its run.

#include "tile_codes.h"
#include "unit_codes.h"

constant constexpr int LONGEST_RUN = 8;

// A unit's share of a tile: where its codes come from, and its vectors go.
template <typename T>
struct UnitTask {
  const device uint* tile;  // its words
  const device half* scales;
  device T* out;            // the vector of the tile's first token
  uint tokens;              // that the tile has
  uint slot, unit;
  float mean[LONGEST_RUN];  // of the run's elements, which all tokens of the tile have on top
};

template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Run {
  T elements[COUNT];
};
// Write a token's run, COUNT elements from element d on but for padding. Without padding they
// are stored at once.
template <int DIM, int FILLED_PAIRS, int COUNT, typename T>
TQ_FUNC void write_run(
    const thread UnitTask<T>& task, uint token, uint d, const thread float* x) {
  device T* out = task.out + token * uint(DIM) + d;
  if (2 * FILLED_PAIRS == DIM && DIM % 32 == 0) {
    Run<T, COUNT> run;
    TQ_UNROLL
    for (int i = 0; i < COUNT; i++) run.elements[i] = T(x[i] + task.mean[i]);
    *reinterpret_cast<device Run<T, COUNT>*>(out) = run;
  } else {
    TQ_UNROLL
    for (int i = 0; i < COUNT; i++) {
      if (2 * FILLED_PAIRS == DIM || d + uint(i) < uint(DIM)) out[i] = T(x[i] + task.mean[i]);
    }
  }
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

// params: the gain, twice the multipliers of even and of odd elements, the bend, the slope.
// Levels are rounded as codecs/trellis_levels.py does, so that every machine has the same.
template <int BITS, int TERMS>
struct ExactPairs<TRELLIS, BITS, TERMS> {
  static TQ_FUNC void decode(uint x, const device float* params, float, thread float* pair) {
    TQ_UNROLL
    for (int e = 0; e < 2; e++) {
      uint window = (x >> (TERMS * e)) & 255u;
      float product = float(1024u + window) * (0.5f * params[1 + e]);
      float u = 2.0f * (product - tq_round(product));
      float bent = u * u - params[3];
      float level = (bent * bent + params[4]) * u;
      pair[e] = tq_round(level * 4096.0f) * (params[0] / 4096.0f);
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
      for (int i = 0; i < READ_PAIRS; i++) codes[i] = code_of(task, token, first + uint(i));
      float x[2 * Order::RUN_PAIRS];
      TQ_UNROLL
      for (int i = 0; i < int(Order::RUN_PAIRS); i++) {
        uint bits = codes[i];
        TQ_UNROLL
        for (int f = 1; f <= int(FOLLOWING); f++) bits |= codes[i + f] << (BITS * f);
        ExactPairs<KIND, BITS, TERMS>::decode(bits, params, norm_range, x + 2 * i);
        x[2 * i] *= scale;
        x[2 * i + 1] *= scale;
      }
      if (!Order::HAS_HALF_UNIT || run == uint(Order::RUN_PAIRS)) {
        write_run<DIM, Order::FILLED_PAIRS, 2 * Order::RUN_PAIRS>(task, token, 2u * first, x);
      } else {
        write_run<DIM, Order::FILLED_PAIRS, Order::RUN_PAIRS>(task, token, 2u * first, x);
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
    uint first = Order::first_pair(task.slot) + uint(Order::RUN_PAIRS) * task.unit;
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
      float x[2 * WIDTH];
      TQ_UNROLL
      for (int c = 0; c < WIDTH; c++) {
        int low_bit;
        uint codes = couple_bits<BITS>(words, WIDTH, 4 * c + row, low_bit) >> low_bit;
        TQ_UNROLL
        for (int e = 0; e < 2; e++) {
          uint code = (codes >> (16 * e)) & CODE_MASK;
          x[VALUES ? WIDTH * e + c : 2 * c + e] =
              exact_level<BITS, TERMS>(coefficients, code) * scale[e];
        }
      }
      if (VALUES) {
        TQ_UNROLL
        for (int e = 0; e < 2; e++) {
          if (token[e] < task.tokens) {
            write_run<DIM, Order::FILLED_PAIRS, WIDTH>(task, token[e], 2u * first, x + WIDTH * e);
          }
        }
      } else if (token[0] < task.tokens) {
        write_run<DIM, Order::FILLED_PAIRS, 2 * WIDTH>(task, token[0], 2u * first, x);
      }
    }
  }
};
