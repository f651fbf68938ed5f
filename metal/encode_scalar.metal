// Vectors to codes of coordinates and one scale each: equalise, rotate, centre, normalise,
// search the gain, quantize, pack. The definition is ChannelTransform.encode in transform.py,
// TurboQuant.encode in codecs/turboquant.py and pack in packing.py; words differ from it only
// where two choices are equal up to the rounding of a sum. One simdgroup encodes one vector,
// a lane elements lane + 32 * i. The entry is at the end.

#include "packing.h"
#include "scale_rules.h"
#include "simd_sums.h"
#include "arguments.h"

// How many of 2^BITS - 1 ascending boundaries are at most x: ties go up.
template <int BITS>
TQ_FUNC uint nearest_level(float x, const threadgroup float* boundaries) {
  uint code = 0u;
  TQ_UNROLL
  for (uint half_range = 1u << (BITS - 1); half_range > 0u; half_range >>= 1) {
    if (x >= boundaries[code + half_range - 1u]) code += half_range;
  }
  return code;
}

// How levels are found: by their magnitudes, all of them in registers, which no load waits for,
// or where there are too many, by a search.
template <int BITS>
struct Levels {
  enum { HALF = 1 << (BITS - 1), IN_REGISTERS = BITS <= 4 };
  float magnitudes[IN_REGISTERS ? HALF : 1];
  float edges[IN_REGISTERS && HALF > 1 ? HALF - 1 : 1];  // between them
  const threadgroup float* table;
  const threadgroup float* boundaries;
};
template <int BITS>
TQ_FUNC Levels<BITS> make_levels(
    const threadgroup float* table, const threadgroup float* boundaries) {
  constexpr int HALF = Levels<BITS>::HALF;
  Levels<BITS> levels;
  levels.table = table;
  levels.boundaries = boundaries;
  if (Levels<BITS>::IN_REGISTERS) {
    TQ_UNROLL
    for (int i = 0; i < HALF; i++) levels.magnitudes[i] = table[HALF + i];
    TQ_UNROLL
    for (int i = 1; i < HALF; i++) levels.edges[i - 1] = boundaries[HALF - 1 + i];
  }
  return levels;
}
// |x|, or if x is negative the next number below it: at an edge ties go up, which for negative
// numbers is inwards.
TQ_FUNC float magnitude_of(float x) {
  uint bits = tq_float_bits(x) & 0x7FFFFFFFu;
  return tq_float(x < 0.0f ? bits - 1u : bits);
}
// The magnitude of the level nearest to x.
template <int BITS>
TQ_FUNC float nearest_magnitude(const thread Levels<BITS>& levels, float x) {
  if (!Levels<BITS>::IN_REGISTERS) {
    float level = levels.table[nearest_level<BITS>(x, levels.boundaries)];
    return level < 0.0f ? -level : level;
  }
  float magnitude = magnitude_of(x);
  float nearest = levels.magnitudes[0];
  TQ_UNROLL
  for (int i = 1; i < Levels<BITS>::HALF; i++) {
    nearest = magnitude >= levels.edges[i - 1] ? levels.magnitudes[i] : nearest;
  }
  return nearest;
}
// Its code.
template <int BITS>
TQ_FUNC uint nearest_code(const thread Levels<BITS>& levels, float x) {
  if (!Levels<BITS>::IN_REGISTERS) return nearest_level<BITS>(x, levels.boundaries);
  constexpr uint HALF = Levels<BITS>::HALF;
  float magnitude = magnitude_of(x);
  uint count = 0u;
  TQ_UNROLL
  for (int i = 1; i < int(HALF); i++) count += magnitude >= levels.edges[i - 1] ? 1u : 0u;
  return x < 0.0f ? HALF - 1u - count : HALF + count;
}

// One 16-bit half of an own word (field < BITS / 2) or of a group's field in a shared word:
// codes of the group's even (parity 0) or odd elements. packing.h draws it.
template <int BITS>
TQ_FUNC uint pack_half(const threadgroup uint* codes, int field, int parity) {
  constexpr int OWN = BITS / 2;
  constexpr int PAIRS_PER_OWN = 16 / BITS;
  constexpr int FIRST_SPARE_PAIR = OWN * PAIRS_PER_OWN + ((BITS & 1) ? 8 / BITS : 0);
  int width = field < OWN ? 16 : 8;
  int count = width / BITS;
  uint half_word = 0u;
  for (int i = 0; i < count; i++) {
    half_word |= codes[2 * (field * PAIRS_PER_OWN + i) + parity] << (BITS * i);
  }
  uint spare_bits = 0u;
  for (int i = FIRST_SPARE_PAIR; i < 8; i++) {
    spare_bits |= codes[2 * i + parity] << (BITS * (i - FIRST_SPARE_PAIR));
  }
  uint spare_mask = (1u << (width % BITS)) - 1u;
  return half_word | (((spare_bits >> ((16 % BITS) * field)) & spare_mask) << (BITS * count));
}

// Both halves of it.
template <int BITS>
TQ_FUNC uint pack_field(const threadgroup uint* codes, int field) {
  return pack_half<BITS>(codes, field, 0) | (pack_half<BITS>(codes, field, 1) << 16);
}

// Word `index` of a packed vector.
template <int DIM, int BITS>
TQ_FUNC uint pack_word(const threadgroup uint* codes, int index) {
  constexpr int OWN = BITS / 2;
  constexpr int GROUPS = (DIM + 15) / 16;
  int chunk = index / BITS;
  int word_of_chunk = index % BITS;
  bool has_no_neighbour = 2 * chunk + 1 == GROUPS;
  const threadgroup uint* group_0 = codes + 32 * chunk;
  const threadgroup uint* group_1 = group_0 + 16;
  if (word_of_chunk < OWN) return pack_field<BITS>(group_0, word_of_chunk);
  if (word_of_chunk < 2 * OWN && !has_no_neighbour) {
    return pack_field<BITS>(group_1, word_of_chunk - OWN);
  }
  uint word = pack_field<BITS>(group_0, OWN);
  return has_no_neighbour ? word : word | (pack_field<BITS>(group_1, OWN) << 8);
}

// x: DIM contiguous elements; signs: DIM, over the channels' gains, read if ROTATE; mean:
// DIM, in the codes' basis, read if CENTER; inverse_gains: GAINS of 1 / gain; codes: scratch
// for DIM rounded up to 32. RULE: of the scale. Every simdgroup of the threadgroup must call
// it; `is_vector` says whether to write.
template <typename T, int DIM, int BITS, int GAINS, bool ROTATE, bool CENTER, int RULE>
TQ_FUNC void encode_vector(
    const device T* x, const device float* signs, const device half* mean,
    const threadgroup float* table, const threadgroup float* boundaries,
    const device float* inverse_gains, threadgroup uint* codes, bool is_vector,
    device uint* words, device half* scale, uint lane) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  float y[PER_LANE];
  float rms = load_rms_normalized<T, DIM, ROTATE, CENTER>(x, signs, mean, lane, y);

  Levels<BITS> levels = make_levels<BITS>(table, boundaries);
  // For every gain <y, c> and ||c||^2 of its codeword c.
  constexpr int SUMS = GAINS <= 1 ? 2 : GAINS <= 2 ? 4 : GAINS <= 4 ? 8 : 16;
  float sums[SUMS];
  TQ_UNROLL
  for (int g = 0; g < SUMS / 2; g++) {
    float dot = 0.0f;
    float code_sq = 0.0f;
    float inverse_gain = g < GAINS ? inverse_gains[g < GAINS ? g : 0] : 0.0f;
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      if (g >= GAINS || int(lane) + 32 * i >= DIM) continue;
      float magnitude = nearest_magnitude<BITS>(levels, y[i] * inverse_gain);
      // y and its level have one sign.
      dot += (y[i] < 0.0f ? -y[i] : y[i]) * magnitude;
      code_sq += magnitude * magnitude;
    }
    sums[2 * g] = dot;
    sums[2 * g + 1] = code_sq;
  }
  simd_sums<SUMS>(sums, lane);
  float best_dot = 0.0f;
  float best_sq = 1.0f;
  float best_gain = 0.0f;
  TQ_UNROLL
  for (int g = 0; g < GAINS; g++) {
    uint own = tq_float_bits(sums[0]);
    float dot = tq_float(simd_shuffle(own, simd_sums_lane<SUMS>(2 * g)));
    float code_sq = tq_float(simd_shuffle(own, simd_sums_lane<SUMS>(2 * g + 1)));
    // cos^2 of the angle between y and its codeword, without the common ||y||.
    if (g == 0 || dot * dot * best_sq > best_dot * best_dot * code_sq) {
      best_dot = dot;
      best_sq = code_sq;
      best_gain = inverse_gains[g];
    }
  }
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    codes[d] = d < DIM ? nearest_code<BITS>(levels, y[i] * best_gain) : 0u;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!is_vector) return;
  for (int w = int(lane); w < tq_words(DIM, BITS); w += 32) {
    words[w] = pack_word<DIM, BITS>(codes, w);
  }
  if (lane == 0u) *scale = scale_from_products<RULE, DIM>(rms, best_dot, best_sq);
}

// Simdgroups: one to a vector, in the order (batch, head, token). table: 2^BITS levels,
// 2^BITS - 1 boundaries between them, GAINS inverse gains.
TQ_ENTRY(encode_scalar) {
  threadgroup float levels[1 << BITS];
  threadgroup float boundaries[1 << BITS];
  threadgroup uint codes[SIMDGROUPS * ((DIM + 31) / 32 * 32)];
  EncodeArguments args = load_arguments(arguments);
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  uint level_count = 1u << BITS;
  for (uint i = thread_index_in_threadgroup; i < level_count; i += 32 * SIMDGROUPS) {
    levels[i] = table[i];
    if (i + 1u < level_count) boundaries[i] = table[level_count + i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // 32 bits are enough to count vectors, and GPUs divide them much faster than 64.
  uint tokens = uint(args.tokens);
  uint heads = uint(args.kv_heads);
  uint vectors = uint(args.batch) * heads * tokens;
  uint index = threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup;
  bool is_vector = index < vectors;
  if (!is_vector) index = vectors - 1u;
  uint all_heads = index / tokens;
  size_t vector = index;
  size_t token = index - all_heads * tokens;
  size_t batch = all_heads / heads;
  size_t head = all_heads % heads;
  size_t page = uint(args.first + int(token)) / uint(args.page);
  encode_vector<T, DIM, BITS, GAINS, ROTATE, CENTER, RULE>(
      x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2],
      signs + size_t(all_heads) * (ROTATE ? DIM : 0),
      means + (CENTER ? batch * means_strides[0] + head * means_strides[1]
                            + page * means_strides[2]
                      : 0),
      levels, boundaries, table + 2u * level_count - 1u,
      codes + simdgroup * ((DIM + 31) / 32 * 32), is_vector,
      words + vector * tq_words(DIM, BITS), scales + vector, lane);
}
