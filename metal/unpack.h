// Packed codes to levels, a pair at a time. The bit layout is drawn in packing.h; the
// levels are defined in mlx_turboquant/polynomial.py.

#include "compat/base.h"
#include "packing.h"

// One group (16 elements, 8 pairs): its own words, and the word it may share with its
// neighbour, shifted so that this group's field is at bit 0 of each half.
template <int BITS>
struct GroupCodes {
  uint own[BITS / 2 + 1];
  uint field;
};

// Where a lane's group lies in the vector at hand; it advances from vector to vector. The
// words are the same for all lanes; offsets are signed, so that a compiler may add constants
// to them in an address.
template <int BITS>
struct GroupCursor {
  const device uint* words;
  int own;
  int shared_word;
  bool is_second;  // of its chunk
};

// words: of a vector of `groups` = ceil(dim / 16) groups.
template <int BITS>
TQ_FUNC GroupCursor<BITS> make_group_cursor(const device uint* words, uint group, uint groups) {
  constexpr int OWN = BITS / 2;
  int chunk = int(group >> 1) * BITS;
  GroupCursor<BITS> cursor;
  cursor.words = words;
  cursor.is_second = (group & 1u) != 0u;
  bool has_no_neighbour = !cursor.is_second && group + 1u == groups;
  cursor.own = chunk + (cursor.is_second ? OWN : 0);
  cursor.shared_word = chunk + (has_no_neighbour ? OWN : 2 * OWN);
  return cursor;
}

// offset: in words, of a vector behind the one that the cursor is at.
template <int BITS>
TQ_FUNC GroupCodes<BITS> load_group(GroupCursor<BITS> cursor, int offset) {
  GroupCodes<BITS> codes;
  TQ_UNROLL
  for (int i = 0; i < BITS / 2; i++) codes.own[i] = cursor.words[cursor.own + offset + i];
  codes.field = 0u;
  if (BITS & 1) {
    codes.field = tq_shift_byte(cursor.words[cursor.shared_word + offset], cursor.is_second);
  }
  return codes;
}

// Pairs of one token to pairs of two: `even` gets the even elements' codes of both tokens
// (a in the low halves), `odd` the odd elements'.
template <int BITS>
TQ_FUNC void split_even_odd(
    GroupCodes<BITS> a, GroupCodes<BITS> b, thread GroupCodes<BITS>& even,
    thread GroupCodes<BITS>& odd) {
  TQ_UNROLL
  for (int i = 0; i < BITS / 2; i++) {
    even.own[i] = tq_low_halves(a.own[i], b.own[i]);
    odd.own[i] = tq_high_halves(a.own[i], b.own[i]);
  }
  even.field = tq_low_halves(a.field, b.field);
  odd.field = tq_high_halves(a.field, b.field);
}

// The word that holds a pair, and the pair's index in it: codes lie at bits
// BITS * index of each half. Other bits are not masked.
template <int BITS>
TQ_FUNC uint pair_word(GroupCodes<BITS> codes, int pair, thread int& index) {
  constexpr int OWN = BITS / 2;
  constexpr int PAIRS_PER_OWN = 16 / BITS;
  constexpr int PAIRS_PER_FIELD = (BITS & 1) ? 8 / BITS : 0;
  if (pair < OWN * PAIRS_PER_OWN) {
    index = pair % PAIRS_PER_OWN;
    return codes.own[pair / PAIRS_PER_OWN];
  }
  index = pair - OWN * PAIRS_PER_OWN;
  if (index < PAIRS_PER_FIELD) return codes.field;
  index -= PAIRS_PER_FIELD;
  // What is left lies in the spare bits: of each own half, then of the field.
  constexpr int SPARE = 16 % BITS;
  constexpr uint SPARE_MASK = ((1u << SPARE) - 1u) * 0x00010001u;
  uint spare_bits = 0u;
  TQ_UNROLL
  for (int i = 0; i < OWN; i++) {
    spare_bits |= ((codes.own[i] >> (BITS * PAIRS_PER_OWN)) & SPARE_MASK) << (SPARE * i);
  }
  if (BITS & 1) {
    constexpr int FIELD_SPARE = 8 % BITS;
    constexpr uint FIELD_MASK = ((1u << FIELD_SPARE) - 1u) * 0x00010001u;
    spare_bits |= ((codes.field >> (BITS * PAIRS_PER_FIELD)) & FIELD_MASK) << (SPARE * OWN);
  }
  return spare_bits;
}

// Levels are gain * u * P(u * u), P of degree TERMS - 1 in the form that polynomial.py
// gives. The gain is the caller's to apply.
template <int TERMS>
struct LevelPolynomial {
  half2 terms[TERMS > 1 ? TERMS - 1 : 1];
};

// params: the gain, then the terms.
template <int TERMS>
TQ_FUNC LevelPolynomial<TERMS> make_polynomial(const device float* params) {
  LevelPolynomial<TERMS> polynomial;
  TQ_UNROLL
  for (int i = 0; i + 1 < TERMS; i++) polynomial.terms[i] = tq_splat(params[1 + i]);
  return polynomial;
}

// Levels of a pair over the gain. No gather: the codes become mantissa bits of a half,
// 2^e + code / 2^BITS exactly, and one subtraction centres them. A shifted word serves
// 9 / BITS pairs, from bit 1 on; e depends on where the pair then lies.
template <int BITS, int TERMS>
TQ_FUNC half2 pair_levels(
    const thread LevelPolynomial<TERMS>& polynomial, GroupCodes<BITS> codes, int pair) {
  constexpr uint CODE_MASK = (1u << BITS) - 1u;
  constexpr int PAIRS_PER_SHIFT = 9 / BITS;
  int index;
  uint word = pair_word<BITS>(codes, pair, index);
  int low_bit = 1 + BITS * (index % PAIRS_PER_SHIFT);
  int shift = BITS * PAIRS_PER_SHIFT * (index / PAIRS_PER_SHIFT) - 1;
  uint shifted = shift < 0 ? word << 1 : word >> shift;
  uint exponent = uint(25 - low_bit - BITS) << 10;
  uint raised = tq_and_or(shifted, (CODE_MASK << low_bit) * 0x00010001u, exponent * 0x00010001u);
  // u = (code - (n - 1) / 2) / n, n = 2^BITS.
  half2 u = tq_half2(raised) - tq_half2((exponent | (CODE_MASK << (low_bit - 1))) * 0x00010001u);
  if (TERMS == 1) return u;
  if (TERMS <= 3) {
    half2 sum = tq_fma(u, u, polynomial.terms[0]);
    if (TERMS == 3) sum = tq_fma(sum, sum, polynomial.terms[1]);
    return sum * u;
  }
  half2 square = u * u;
  half2 sum = polynomial.terms[0];
  TQ_UNROLL
  for (int i = 1; i < TERMS - 1; i++) sum = tq_fma(sum, square, polynomial.terms[i]);
  return tq_fma(sum, square, tq_splat(1.0f)) * u;
}
