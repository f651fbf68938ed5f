// All tokens of a side, in the order of the text, as vectors in the codes' basis: what attention
// of a prompt multiplies. Sink and recent tokens are rotated (ChannelTransform.encode), a
// simdgroup to a vector; packed ones are decoded (exact_codes.h), a thread to a unit of a slot,
// and get the mean of their page back. The entry is at the end.

#include "exact_codes.h"
#include "hadamard.h"
#include "arguments.h"

// x: DIM contiguous elements; signs: DIM, over the channels' gains, read if ROTATE.
template <typename TX, typename T, int DIM, bool ROTATE>
TQ_FUNC void encode_plain(const device TX* x, const device float* signs, device T* out, uint lane) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  float y[PER_LANE];
  load_elements<TX, DIM>(x, 1, lane, y);
  rotate<DIM, ROTATE>(y, signs, lane);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    if (d < DIM) out[d] = T(ROTATE ? y[i] * tq_rsqrt(float(DIM)) : y[i]);
  }
}

// mean: of the tile's page, DIM elements, read if CENTER.
template <typename Order, int DIM, bool CENTER, typename T>
TQ_FUNC void load_mean(const device half* mean, thread UnitTask<T>& task) {
  uint first = 2u * (Order::first_pair(task.slot) + uint(Order::RUN_PAIRS) * task.unit);
  TQ_UNROLL
  for (int i = 0; i < LONGEST_RUN; i++) {
    bool is_element = i < 2 * int(Order::RUN_PAIRS) && first + uint(i) < uint(DIM);
    task.mean[i] = CENTER && is_element ? float(mean[first + uint(i)]) : 0.0f;
  }
}

// Threadgroups: first those of plain tokens, a simdgroup to a vector in the order (batch, head,
// token); then those of packed ones, a thread to a unit of every slot, in the order (batch, head,
// tile, slot, unit): then what a simdgroup reads at once are whole lines of 8 slots, and what it
// writes lies together. Heads are those from first_head on; tiles says where each tile lies in
// the buffers, as PackedTokens has it.
TQ_ENTRY(materialize) {
  typedef TileOrder<KIND, DIM, BITS, TERMS, VALUES> Order;
  MaterializeArguments args = load_arguments(arguments);
  // 32 bits are enough to count threads, and GPUs divide them much faster than 64.
  uint heads = uint(args.heads);
  uint packed = uint(args.packed);
  uint plain = uint(args.sink + args.recent);
  uint total = packed + plain;
  uint plain_groups = (plain * heads * uint(args.batch) + uint(THREADS) / 32u - 1u)
                      / (uint(THREADS) / 32u);
  uint group = threadgroup_position_in_grid.x;
  if (group < plain_groups) {
    uint index = group * (uint(THREADS) / 32u) + simdgroup_index_in_threadgroup;
    uint row = index / plain;
    uint token = index - row * plain;
    size_t batch = row / heads;
    size_t head = uint(args.first_head) + row % heads;
    if (batch >= size_t(args.batch)) return;
    bool is_sink = token < uint(args.sink);
    size_t recent_token = token - uint(args.sink);
    encode_plain<TX, T, DIM, ROTATE>(
        is_sink ? sink + batch * sink_strides[0] + head * sink_strides[1] + token * sink_strides[2]
                : recent + batch * recent_strides[0] + head * recent_strides[1]
                      + recent_token * recent_strides[2],
        signs + (batch * size_t(args.all_heads) + head) * (ROTATE ? DIM : 0),
        out + (size_t(row) * total + (is_sink ? token : token + packed)) * DIM,
        thread_index_in_simdgroup);
    return;
  }
  uint index = (group - plain_groups) * uint(THREADS) + thread_index_in_threadgroup;
  uint tile_count = (packed + uint(TILE_TOKENS) - 1u) / uint(TILE_TOKENS);
  uint slots = index / uint(Order::UNITS);
  uint row = slots / uint(TILE_TOKENS) / tile_count;
  uint tile = slots / uint(TILE_TOKENS) % tile_count;
  size_t batch = row / heads;
  size_t head = uint(args.first_head) + row % heads;
  if (batch >= size_t(args.batch)) return;
  size_t place = tiles[tile];
  uint first_token = uint(TILE_TOKENS) * tile;
  UnitTask<T> task;
  task.tile = words + batch * words_strides[0] + head * words_strides[1]
              + place * words_strides[2];
  task.scales = scales + batch * scales_strides[0] + head * scales_strides[1]
                + place * scales_strides[2];
  task.out = out + (size_t(row) * total + uint(args.sink) + first_token) * DIM;
  task.tokens = tq_min(uint(TILE_TOKENS), packed - first_token);
  task.slot = slots % uint(TILE_TOKENS);
  task.unit = index % uint(Order::UNITS);
  const device half* mean = means;
  if (CENTER) {
    uint page_tiles = uint(args.page) / uint(TILE_TOKENS);
    size_t page = uint(tiles[tile / page_tiles * page_tiles]) / page_tiles;
    mean += batch * means_strides[0] + head * means_strides[1] + page * means_strides[2];
  }
  load_mean<Order, DIM, CENTER>(mean, task);
  UnitDecoder<KIND, T, DIM, BITS, TERMS, VALUES>::decode(task, params);
}
