// The search for the nearest path through a shift-register trellis, as codecs/viterbi.py
// defines it: its costs are whole numbers, and exact here too. One simdgroup searches.
//
// Steps run from the last element to the first. A branch is a window of 8 bits, OWN of them
// the step's own; behind it NEXT bits fall out at the top, the survivor's name:
//
//     window of a step          | 7 ..  8 - NEXT | ..        OWN | OWN - 1 .. 0 |
//                               |<--- state before the step ---->|<-- own bits ->|
//                               |<-- survivor -->|<--- state behind the step --->|
//     window of the next step                    | 7 ..     NEXT | NEXT - 1 .. 0 |
//
// Of all branches to a state behind a step only the cheapest survives, and which it was is
// NEXT bits. A cost is a float from 2^23 on, whose mantissa is 16 times the cost plus the
// top bits of its state, at most 4: those which the step's branches from that state have as
// a survivor. So sums carry where they come from, and one minimum finds cost and survivor.
//
//     bit of a cost   31 .. 23        | 22  ..  4 | 3  ..  0
//                     those of 2^23   | cost      | survivor
//
// A lane has 8 branches: of 4 states, whose costs lie together, and 2 values of the own
// bits' lowest one. The states it reads end, as far as survivors have bits to tell them
// apart, in the same states.

#include "compat/base.h"

// Steps on either side of the end that the first pass sees: TrellisGraph.overlap of viterbi.py.
constexpr int tq_overlap(int own_bits_of_two) { return own_bits_of_two > 6 ? 16 : 32; }
constant constexpr int MAX_STATES = 128;  // before a step
// Targets are clipped here: CLIP of viterbi.py.
constant constexpr float CLIP = 380.0f;
// The least cost every 32 steps: more than CLIP squared, and far from the end.
constant constexpr uint START_COST = 5u << 15;
constant constexpr uint INFINITE_COST = 600000u;  // START_COST and more than any branch costs

TQ_FUNC float make_cost(uint cost, uint survivor) {
  return tq_float(0x4B000000u + 16u * cost + survivor);
}

// How branches and states lie on lanes at a step of OWN bits before one of NEXT. `x` of a
// lane's four states: two bits of the survivor, or the survivor and the lowest bit below it.
template <int OWN, int NEXT>
struct LaneLayout {
  enum {
    LOW_BITS = 8 - OWN - NEXT,                       // of a state below its survivor
    LANE_STATES = NEXT == 1 ? 4 : NEXT == 2 ? 2 : 1  // states behind the step on a lane
  };
  // Where a state's cost lies before the step.
  static TQ_FUNC uint cost_index(uint state) {
    uint low = state & ((1u << LOW_BITS) - 1u);
    if (NEXT == 1) return (low >> 1) * 4u + (state >> LOW_BITS) * 2u + low % 2u;
    uint survivor = state >> LOW_BITS;
    return ((survivor >> 2) << LOW_BITS | low) * 4u + survivor % 4u;
  }
  // Where a lane's four costs begin.
  static TQ_FUNC uint first_cost(uint lane) {
    if (NEXT == 1) return (lane >> (OWN - 1)) * 4u;
    uint low = (lane >> (OWN - 1)) & ((1u << LOW_BITS) - 1u);
    return ((lane >> (7 - NEXT)) << LOW_BITS | low) * 4u;
  }
  // The window of a lane's branch from its state x, with e the lowest own bit.
  static TQ_FUNC uint window(uint lane, int x, int e) {
    uint own = (lane & ((1u << (OWN - 1)) - 1u)) * 2u + uint(e);
    uint low = lane >> (OWN - 1);
    uint state;
    if (NEXT == 1) {
      state = uint(x >> 1) << LOW_BITS | low << 1 | uint(x & 1);
    } else {
      uint survivor = (lane >> (7 - NEXT)) * 4u + uint(x);
      state = survivor << LOW_BITS | (low & ((1u << LOW_BITS) - 1u));
    }
    return state << OWN | own;
  }
  // Of the states behind the step that a lane keeps survivors of, number `slot`.
  static TQ_FUNC uint lane_state(uint lane, int slot) {
    if (NEXT == 1) {
      uint own = (lane & ((1u << (OWN - 1)) - 1u)) * 2u + uint(slot & 1);
      return (lane >> (OWN - 1) << 1 | uint(slot >> 1)) << OWN | own;
    }
    uint half_state = lane & ((1u << (7 - NEXT)) - 1u);
    return 2u * half_state + (NEXT == 2 ? uint(slot) : lane >> 4);
  }
  // The other way: the lane that keeps a state's survivor, and its place among 4 bits.
  static TQ_FUNC uint lane_of(uint state) {
    if (NEXT == 1) {
      return state >> (OWN + 1) << (OWN - 1) | ((state >> 1) & ((1u << (OWN - 1)) - 1u));
    }
    return NEXT == 2 ? state >> 1 : state % 2u << 4 | state >> 1;
  }
  static TQ_FUNC uint survivor_shift(uint state) {
    if (NEXT == 1) return ((state >> OWN) % 2u) * 2u + state % 2u;
    return NEXT == 2 ? 2u * (state % 2u) : 0u;
  }
};

// What a lane adds for its branches at steps of one parity: -32 * level and 16 * level^2.
struct LaneBranches {
  float slopes[8];
  float squares[8];
};

template <int OWN, int NEXT>
TQ_FUNC LaneBranches make_branches(const device float* levels, uint lane) {
  LaneBranches branches;
  TQ_UNROLL
  for (int j = 0; j < 8; j++) {
    float level = levels[LaneLayout<OWN, NEXT>::window(lane, j / 2, j % 2)];
    branches.slopes[j] = -32.0f * level;
    branches.squares[j] = 16.0f * level * level;
  }
  return branches;
}

// One step: `costs` of the states before it, `costs_behind` of those behind it; target_cost
// is what all branches cost alike. Returns the survivors that this lane keeps, 4 bits.
template <int OWN, int NEXT>
TQ_FUNC uint trellis_step(
    float target, float target_cost, const thread LaneBranches& branches,
    const threadgroup float* costs, threadgroup float* costs_behind, uint lane) {
  typedef LaneLayout<OWN, NEXT> Layout;
  typedef LaneLayout<NEXT, OWN> NextLayout;
  float state_costs[4];
  tq_load4(costs + Layout::first_cost(lane), state_costs);
  float branch_costs[8];
  TQ_UNROLL
  for (int j = 0; j < 8; j++) {
    branch_costs[j] = target * branches.slopes[j] + (state_costs[j / 2] + branches.squares[j]);
  }
  float best[4];
  if (NEXT == 1) {
    TQ_UNROLL
    for (int slot = 0; slot < 4; slot++) {
      best[slot] = tq_min(branch_costs[slot], branch_costs[4 + slot]);
    }
  } else {
    best[0] = tq_min(
        tq_min(branch_costs[0], branch_costs[2]), tq_min(branch_costs[4], branch_costs[6]));
    best[1] = tq_min(
        tq_min(branch_costs[1], branch_costs[3]), tq_min(branch_costs[5], branch_costs[7]));
  }
  if (NEXT > 2) {
    // Half of the lanes have half of the survivors: each keeps one of the two states.
    bool keeps_odd = lane >= 16u;
    float other = simd_shuffle_xor(keeps_odd ? best[0] : best[1], ushort(16));
    best[0] = tq_min(keeps_odd ? best[1] : best[0], other);
    if (NEXT > 3) best[0] = tq_min(best[0], simd_shuffle_xor(best[0], ushort(8)));
  }
  uint survivors = 0u;
  TQ_UNROLL
  for (int slot = 0; slot < Layout::LANE_STATES; slot++) {
    uint bits = tq_float_bits(best[slot]);
    survivors |= (bits & ((1u << NEXT) - 1u)) << (NEXT * slot);
    uint state = Layout::lane_state(lane, slot);
    float cost = tq_float(tq_and_or(bits, ~15u, state >> NextLayout::LOW_BITS));
    costs_behind[NextLayout::cost_index(state)] = cost + target_cost;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  return survivors;
}

// Steps `first` .. first + count (round the circle of COUNT), 8 at a time; targets in the
// order of steps. costs: two buffers of MAX_STATES, the first filled. The survivors of 8
// steps are a word a lane.
template <int COUNT, int EVEN, int ODD>
TQ_FUNC void search_forward(
    const threadgroup float* targets, int first, int count, const thread LaneBranches& even,
    const thread LaneBranches& odd, threadgroup float* costs, threadgroup uint* survivors,
    uint lane) {
  for (int t = 0; t < count; t += 8) {
    float rebase = 0.0f;  // brings the least cost back to START_COST
    if (t % 32 == 0) {
      float four[4];
      tq_load4(costs + LaneLayout<ODD, EVEN>::first_cost(lane), four);
      float least = tq_min(tq_min(four[0], four[1]), tq_min(four[2], four[3]));
      TQ_UNROLL
      for (int stride = 1; stride < 32; stride <<= 1) {
        least = tq_min(least, simd_shuffle_xor(least, ushort(stride)));
      }
      rebase = make_cost(START_COST, 0u) - tq_float(tq_float_bits(least) & ~15u);
    }
    float target[8];
    int at = first + t < COUNT ? first + t : first + t - COUNT;
    tq_load4(targets + at, target);
    tq_load4(targets + at + 4, target + 4);
    uint word = 0u;
    TQ_UNROLL
    for (int i = 0; i < 8; i += 2) {
      float odd_cost = 16.0f * target[i] * target[i] + (i == 0 ? rebase : 0.0f);
      float even_cost = 16.0f * target[i + 1] * target[i + 1];
      word |= trellis_step<ODD, EVEN>(target[i], odd_cost, odd, costs, costs + MAX_STATES, lane)
              << (4 * i);
      word |= trellis_step<EVEN, ODD>(
                  target[i + 1], even_cost, even, costs + MAX_STATES, costs, lane)
              << (4 * i + 4);
    }
    survivors[(t / 8) * 32 + int(lane)] = word;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The window of step t of a pass, of OWN bits before a step of NEXT, if the path goes on in
// `state` behind it.
template <int OWN, int NEXT>
TQ_FUNC uint traced_window(const threadgroup uint* survivors, int t, uint state) {
  typedef LaneLayout<OWN, NEXT> Layout;
  uint word = survivors[(t / 8) * 32 + int(Layout::lane_of(state))] >> (4 * (t % 8));
  uint survivor = (word >> Layout::survivor_shift(state)) & ((1u << NEXT) - 1u);
  return survivor << (8 - NEXT) | state;
}

// Costs before a step of OWN bits and one of NEXT: of paths from any state, or from one.
template <int OWN, int NEXT>
TQ_FUNC void start_costs(threadgroup float* costs, bool from_any, uint only, uint lane) {
  typedef LaneLayout<OWN, NEXT> Layout;
  for (uint state = lane; state < (256u >> OWN); state += 32u) {
    uint cost = from_any || state == only ? START_COST : INFINITE_COST;
    costs[Layout::cost_index(state)] = make_cost(cost, state >> Layout::LOW_BITS);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The state that costs least before a step of OWN bits and one of NEXT; of equals the first.
template <int OWN, int NEXT>
TQ_FUNC uint cheapest_state(const threadgroup float* costs, uint lane) {
  uint best_cost = 0xFFFFFFFFu;
  uint best_state = 0u;
  for (uint state = lane; state < (256u >> OWN); state += 32u) {
    uint cost = tq_float_bits(costs[LaneLayout<OWN, NEXT>::cost_index(state)]) & ~15u;
    best_state = cost < best_cost ? state : best_state;
    best_cost = tq_min(best_cost, cost);
  }
  TQ_UNROLL
  for (int stride = 1; stride < 32; stride <<= 1) {
    uint cost = simd_shuffle_xor(best_cost, ushort(stride));
    uint state = simd_shuffle_xor(best_state, ushort(stride));
    best_state =
        cost < best_cost || (cost == best_cost && state < best_state) ? state : best_state;
    best_cost = tq_min(best_cost, cost);
  }
  return best_state;
}
