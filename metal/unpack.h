// Codes of one group (16 elements, 8 pairs) to levels. The bit layout is defined in
// mlx_turboquant/packing.py, the levels in codebook.py. One lane decodes one group.

// The words of a group: its own, and the shared one with this group's field moved to
// bit 0 of each half.
template <int BITS>
struct GroupCodes {
  uint own[BITS / 2 + 1];
  uint field;
};

// words: the packed vector; groups: ceil(dim / 16) of it.
template <int BITS>
TQ_FUNC GroupCodes<BITS> load_group(const device uint* words, uint group, uint groups) {
  constexpr int OWN = BITS / 2;
  GroupCodes<BITS> codes;
  uint place = group & 1u;
  const device uint* chunk = words + (group >> 1) * BITS;
  TQ_UNROLL
  for (int i = 0; i < OWN; i++) codes.own[i] = chunk[place * OWN + i];
  codes.field = 0u;
  if (BITS & 1) {
    bool alone = place == 0u && group + 1u == groups;
    codes.field = chunk[alone ? OWN : 2 * OWN] >> (8u * place);
  }
  return codes;
}

// Bits of the pair's two codes, at bits 0 and 16; the word's other bits are not masked.
template <int BITS>
TQ_FUNC uint pair_bits(GroupCodes<BITS> codes, int pair) {
  constexpr int OWN = BITS / 2;
  constexpr int PER_OWN = 16 / BITS;
  constexpr int PER_FIELD = (BITS & 1) ? 8 / BITS : 0;
  if (pair < OWN * PER_OWN) {
    return codes.own[pair / PER_OWN] >> (BITS * (pair % PER_OWN));
  }
  int rest = pair - OWN * PER_OWN;
  if (rest < PER_FIELD) return codes.field >> (BITS * rest);
  // What is left lies in the spare bits: of each own half, then of the field.
  constexpr int SPARE = 16 % BITS;
  constexpr uint MASK = ((1u << SPARE) - 1u) * 0x00010001u;
  uint stream = 0u;
  TQ_UNROLL
  for (int i = 0; i < OWN; i++) {
    stream |= ((codes.own[i] >> (BITS * PER_OWN)) & MASK) << (SPARE * i);
  }
  if (BITS & 1) {
    constexpr int LAST = 8 % BITS;
    constexpr uint LAST_MASK = ((1u << LAST) - 1u) * 0x00010001u;
    stream |= ((codes.field >> (BITS * PER_FIELD)) & LAST_MASK) << (SPARE * OWN);
  }
  return stream >> (BITS * (rest - PER_FIELD));
}

// Levels of a pair as an odd polynomial of the centred code, in half2: no table and no
// gather. coefficients: TERMS of them, of u, u^3, ..., with u = (code - (n-1)/2) / n.
template <int BITS, int TERMS>
TQ_FUNC half2 pair_levels(uint bits, const thread half2* coefficients) {
  constexpr uint MASK = ((1u << BITS) - 1u) * 0x00010001u;
  // The code becomes the top mantissa bits of a half in [1, 2): 1 + code / n exactly.
  uint raised = ((bits & MASK) << (10 - BITS)) | 0x3C003C00u;
  half2 u = tq_half2(raised) - tq_splat(1.0f + 0.5f - 0.5f / float(1 << BITS));
  half2 square = u * u;
  half2 sum = coefficients[TERMS > 0 ? TERMS - 1 : 0];
  TQ_UNROLL
  for (int i = TERMS - 2; i >= 0; i--) sum = tq_fma(sum, square, coefficients[i]);
  return sum * u;
}

// How a side decodes: TERMS > 0 computes levels, TERMS == 0 looks them up in
// threadgroup memory (from 6 bits a polynomial no longer reaches the levels).
template <int BITS, int TERMS>
struct Levels {
  half2 coefficients[TERMS > 0 ? TERMS : 1];
  const threadgroup float* table;
};

template <int BITS, int TERMS>
TQ_FUNC half2 level_pair(const thread Levels<BITS, TERMS>& levels, GroupCodes<BITS> codes, int pair) {
  uint bits = pair_bits<BITS>(codes, pair);
  if (TERMS > 0) return pair_levels<BITS, TERMS>(bits, levels.coefficients);
  constexpr uint MASK = (1u << BITS) - 1u;
  return tq_half2(levels.table[bits & MASK], levels.table[(bits >> 16) & MASK]);
}
