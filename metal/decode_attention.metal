// Decode attention, pass 1: one simdgroup attends ROWS query rows of one KV head to a
// run of packed tokens and writes an unnormalised partial result. Every code is decoded
// once for all ROWS. Pass 2 is merge_blocks.metal.
//
// A vector of D elements has D / 16 groups; a lane decodes one group, so LANES =
// D / 16 rounded up to a power of two lanes own a token, and a simdgroup holds
// STEP = 32 / LANES tokens at a time. Work goes in tiles of 32 tokens:
//   1. logits: after step i, lane (i mod LANES) of each token keeps its logit, so that
//      a full tile leaves one token's logits on every lane;
//   2. one softmax update per tile: maximum over lanes, rescale, exponentials;
//   3. values: the weights travel back by shuffle, each lane adds its 16 elements.
// Logits are in units of log2. Products of 16 elements, and sums of a lane's tokens of
// one tile, are in half2; everything longer is float.

#include "unpack.h"

constant constexpr int TILE = 32;

constexpr int tq_lanes(int dim) {
  int groups = (dim + 15) / 16;
  int lanes = 1;
  while (lanes < groups) lanes *= 2;
  return lanes;
}

// What a launch is told besides templates; each field an int of `sizes`, in order.
struct Sizes {
  int length;    // packed tokens in use
  int capacity;  // tokens the packed buffers hold
  int blocks;    // partial results per KV head
  int run;       // tokens per block, a multiple of TILE
  int heads;     // KV heads
  int rows;      // query rows per KV head: group * L
  int first;     // column of the mask that belongs to packed token 0
  int columns;   // columns of the mask
};

// A token of the tile lives on this lane after the logits of a tile.
TQ_FUNC uint owner_lane(uint token, uint lanes) {
  uint step = 32u / lanes;
  return (token % step) * lanes + token / step;
}

// Sum each of N values over N neighbouring lanes; lane i (mod N) gets sum i. N - 1
// shuffles, where summing one value at a time would take N log2(N).
template <int N>
TQ_FUNC float transpose_sum(thread float* values, uint lane) {
  TQ_UNROLL
  for (int half_n = N / 2; half_n > 0; half_n /= 2) {
    bool upper = (lane & uint(half_n)) != 0u;
    TQ_UNROLL
    for (int i = 0; i < half_n; i++) {
      float kept = upper ? values[i + half_n] : values[i];
      float sent = upper ? values[i] : values[i + half_n];
      values[i] = kept + simd_shuffle_xor(sent, ushort(half_n));
    }
  }
  return values[0];
}

// Tokens past the end and lanes past the last group read something that is there, so
// that loads need no branch and can all be in flight; it then counts for nothing.
template <int DIM, int BITS, int TERMS, int ROWS>
TQ_FUNC void tile_logits(
    const thread half2* q, const thread Levels<BITS, TERMS>& levels,
    const device uint* words, const device half* scales, int first, int last,
    uint lane, thread float* logits) {
  constexpr int LANES = tq_lanes(DIM);
  constexpr uint GROUPS = (DIM + 15) / 16;
  constexpr int WORDS = (GROUPS / 2) * BITS + (GROUPS % 2) * ((BITS + 1) / 2);
  constexpr int STEP = 32 / LANES;
  uint group = tq_min(lane % LANES, GROUPS - 1u);
  uint place = lane / LANES;
  GroupCodes<BITS> codes[LANES];
  TQ_UNROLL
  for (int i = 0; i < LANES; i++) {
    uint token = tq_min(uint(first) + i * STEP + place, uint(last) - 1u);
    codes[i] = load_group<BITS>(words + size_t(token) * WORDS, group, GROUPS);
  }
  uint own = tq_min(uint(first) + (lane % LANES) * STEP + place, uint(last) - 1u);
  float scale = float(scales[own]);
  float sums[ROWS * LANES];
  TQ_UNROLL
  for (int i = 0; i < LANES; i++) {
    half2 dots[ROWS];
    TQ_UNROLL
    for (int p = 0; p < 8; p++) {
      half2 level = level_pair<BITS, TERMS>(levels, codes[i], p);
      TQ_UNROLL
      for (int r = 0; r < ROWS; r++) {
        dots[r] = p == 0 ? q[r * 8] * level : tq_fma(q[r * 8 + p], level, dots[r]);
      }
    }
    TQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      sums[r * LANES + i] = tq_low(dots[r]) + tq_high(dots[r]);
    }
  }
  TQ_UNROLL
  for (int r = 0; r < ROWS; r++) {
    logits[r] = transpose_sum<LANES>(sums + r * LANES, lane) * scale;
  }
}

template <int DIM, int BITS, int TERMS, int ROWS, int KEY_LANES>
TQ_FUNC void tile_values(
    const thread float* weights, const thread Levels<BITS, TERMS>& levels,
    const device uint* words, const device half* scales, int first, int last,
    uint lane, thread float* sums) {
  constexpr int LANES = tq_lanes(DIM);
  constexpr uint GROUPS = (DIM + 15) / 16;
  constexpr int WORDS = (GROUPS / 2) * BITS + (GROUPS % 2) * ((BITS + 1) / 2);
  constexpr int STEP = 32 / LANES;
  uint group = tq_min(lane % LANES, GROUPS - 1u);
  uint place = lane / LANES;
  // The token this lane has weights of: scale them once, before they travel.
  uint own = (lane % KEY_LANES) * (32 / KEY_LANES) + lane / KEY_LANES;
  float scale = float(scales[tq_min(uint(first) + own, uint(last) - 1u)]);
  GroupCodes<BITS> codes[LANES];
  TQ_UNROLL
  for (int i = 0; i < LANES; i++) {
    uint token = tq_min(uint(first) + i * STEP + place, uint(last) - 1u);
    codes[i] = load_group<BITS>(words + size_t(token) * WORDS, group, GROUPS);
  }
  // Weights of a tile are at most 1 in half precision, whatever the scales are.
  float largest = tq_max(simd_max(scale), 1e-30f);
  float scaled[ROWS];
  TQ_UNROLL
  for (int r = 0; r < ROWS; r++) scaled[r] = weights[r] * (scale / largest);
  half2 tile_sums[ROWS * 8];
  TQ_UNROLL
  for (int i = 0; i < LANES; i++) {
    ushort owner = ushort(owner_lane(i * STEP + place, KEY_LANES));
    half2 weight[ROWS];
    TQ_UNROLL
    for (int r = 0; r < ROWS; r++) weight[r] = tq_splat(simd_shuffle(scaled[r], owner));
    TQ_UNROLL
    for (int p = 0; p < 8; p++) {
      half2 level = level_pair<BITS, TERMS>(levels, codes[i], p);
      TQ_UNROLL
      for (int r = 0; r < ROWS; r++) {
        int at = r * 8 + p;
        tile_sums[at] =
            i == 0 ? weight[r] * level : tq_fma(weight[r], level, tile_sums[at]);
      }
    }
  }
  TQ_UNROLL
  for (int at = 0; at < ROWS * 8; at++) {
    sums[2 * at] += tq_low(tile_sums[at]) * largest;
    sums[2 * at + 1] += tq_high(tile_sums[at]) * largest;
  }
}

// Grid: (32 * SIMDGROUPS * ceil(blocks / SIMDGROUPS), row tiles * heads, batch) threads.
//   q          T (batch, heads * rows, DK), rotated; q_scale is scale * log2(e)
//   *_words    uint (batch, heads, capacity, words), *_scales half (.., capacity)
//   k_levels, v_levels   float: coefficients if TERMS > 0, else the table of levels
//   mask       float (batch, heads * rows, columns), in log2 units; read if MASKED
//   partial    float (batch, heads * rows, blocks, DV + 2): sums, maximum, denominator
template <typename T, int DK, int DV, int KB, int VB, int K_TERMS, int V_TERMS, int ROWS, bool MASKED>
TQ_FUNC void attend_block(
    const device T* q, float q_scale, const device uint* k_words, const device half* k_scales,
    const device uint* v_words, const device half* v_scales, const device float* mask,
    const thread Levels<KB, K_TERMS>& k_levels,
    const thread Levels<VB, V_TERMS>& v_levels, const thread Sizes& sizes,
    device float* partial, uint block, uint head, uint row_tile, uint batch, uint lane) {
  constexpr int K_LANES = tq_lanes(DK);
  constexpr int V_LANES = tq_lanes(DV);
  constexpr uint K_GROUPS = (DK + 15) / 16;
  constexpr uint V_GROUPS = (DV + 15) / 16;
  constexpr int K_WORDS = (K_GROUPS / 2) * KB + (K_GROUPS % 2) * ((KB + 1) / 2);
  constexpr int V_WORDS = (V_GROUPS / 2) * VB + (V_GROUPS % 2) * ((VB + 1) / 2);
  size_t place = size_t(batch) * sizes.heads + head;
  k_words += place * sizes.capacity * K_WORDS;
  v_words += place * sizes.capacity * V_WORDS;
  k_scales += place * sizes.capacity;
  v_scales += place * sizes.capacity;
  int row0 = int(row_tile) * ROWS;
  size_t first_row = place * sizes.rows + row0;

  half2 query[ROWS * 8];
  int first_element = int(lane % K_LANES) * 16;
  TQ_UNROLL
  for (int r = 0; r < ROWS; r++) {
    TQ_UNROLL
    for (int p = 0; p < 8; p++) {
      int d = first_element + 2 * p;
      size_t at = (first_row + r) * DK + d;
      bool there = row0 + r < sizes.rows;  // else zero: counts for nothing
      float low = there && d < DK ? float(q[at]) * q_scale : 0.0f;
      float high = there && d + 1 < DK ? float(q[at + 1]) * q_scale : 0.0f;
      query[r * 8 + p] = tq_half2(low, high);
    }
  }
  float sums[ROWS * 16];
  float maximum[ROWS];
  float denominator[ROWS];
  TQ_UNROLL
  for (int i = 0; i < ROWS * 16; i++) sums[i] = 0.0f;
  TQ_UNROLL
  for (int r = 0; r < ROWS; r++) {
    maximum[r] = -1e30f;
    denominator[r] = 0.0f;
  }

  int start = int(block) * sizes.run;
  int stop = start + sizes.run < sizes.length ? start + sizes.run : sizes.length;
  // The token whose logits this lane keeps after each tile.
  int own = int(lane % K_LANES) * (32 / K_LANES) + int(lane / K_LANES);
  for (int tile = start; tile < stop; tile += TILE) {
    float logits[ROWS];
    tile_logits<DK, KB, K_TERMS, ROWS>(
        query, k_levels, k_words, k_scales, tile, stop, lane, logits);
    bool there = tile + own < stop;
    TQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      float logit = logits[r];
      if (MASKED && there && row0 + r < sizes.rows) {
        logit += mask[(first_row + r) * sizes.columns + sizes.first + tile + own];
      }
      float top = tq_max(maximum[r], simd_max(there ? logit : -1e30f));
      if (top > maximum[r]) {  // the same on every lane
        float shrink = tq_exp2(maximum[r] - top);
        denominator[r] *= shrink;
        TQ_UNROLL
        for (int e = 0; e < 16; e++) sums[r * 16 + e] *= shrink;
        maximum[r] = top;
      }
      logits[r] = there ? tq_exp2(logit - top) : 0.0f;
      denominator[r] += logits[r];
    }
    tile_values<DV, VB, V_TERMS, ROWS, K_LANES>(
        logits, v_levels, v_words, v_scales, tile, stop, lane, sums);
  }

  uint v_group = lane % V_LANES;
  TQ_UNROLL
  for (int r = 0; r < ROWS; r++) {
    float total = simd_sum(denominator[r]);
    device float* out = partial + ((first_row + r) * sizes.blocks + block) * (DV + 2);
    TQ_UNROLL
    for (int e = 0; e < 16; e++) {
      float sum = sums[r * 16 + e];
      TQ_UNROLL
      for (int step = V_LANES; step < 32; step *= 2) {
        sum += simd_shuffle_xor(sum, ushort(step));
      }
      int d = int(v_group) * 16 + e;
      if (lane < V_LANES && d < DV && row0 + r < sizes.rows) out[d] = sum;
    }
    if (lane == 0u && row0 + r < sizes.rows) {
      out[DV] = maximum[r];
      out[DV + 1] = total;
    }
  }
}

// Fill a side's decoder: coefficients into registers, or the table into threadgroup
// memory (every thread of the threadgroup calls it, then a barrier).
template <int BITS, int TERMS>
TQ_FUNC Levels<BITS, TERMS> make_levels(
    const device float* given, threadgroup float* table, uint thread_index, uint threads) {
  Levels<BITS, TERMS> levels;
  levels.table = table;
  if (TERMS > 0) {
    TQ_UNROLL
    for (int i = 0; i < (TERMS > 0 ? TERMS : 1); i++) {
      levels.coefficients[i] = tq_splat(given[i]);
    }
  } else {
    for (uint i = thread_index; i < (1u << BITS); i += threads) table[i] = given[i];
  }
  return levels;
}
