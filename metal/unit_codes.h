// Codes of coordinates in a unit of tile order (mlx_turboquant/tiles.py): a word is two 16-bit
// halves, first elements of couples in low halves, second ones at the same places of high
// halves, so that one shift yields both codes of a couple. A unit's 16 couples fill its BITS
// words in order, 16 / BITS to a half. Where bits are left over, the codes begin at bit 1, which
// saves half of the shifts, and the remaining couples are spelled by what is left. At 3 bits
// (couples 0 .. 14, and the last one by bits a of three words):
//
//     bit    15 .. 13 | 12 .. 10 | 9 .. 7   | 6 .. 4   | 3 .. 1   | 0
//            couple 4 | couple 3 | couple 2 | couple 1 | couple 0 | a

#include "compat/base.h"

// Words of a unit of so many columns.
constexpr int tq_unit_words(int bits, int columns) { return (4 * columns * bits + 15) / 16; }

// Codes of a couple number `couple` at bits low_bit .. of each half, others there too.
template <int BITS>
TQ_FUNC uint couple_bits(const thread uint* words, int columns, int couple, thread int& low_bit) {
  constexpr int PER_HALF = 16 / BITS;
  constexpr int SPARE = 16 % BITS;
  constexpr int BASE = SPARE > 0 ? 1 : 0;
  constexpr int PER_SHIFT = 9 / BITS;  // that low mantissa bits have room for, from bit 1 on
  int remaining = couple - PER_HALF * tq_unit_words(BITS, columns);
  if (remaining < 0) {
    int index = couple % PER_HALF;
    int shift = BITS * PER_SHIFT * (index / PER_SHIFT) + BASE - 1;
    uint word = words[couple / PER_HALF];
    low_bit = 1 + BITS * (index % PER_SHIFT);
    return shift < 0 ? word << 1 : word >> shift;
  }
  low_bit = 1;
  uint spelled = 0u;
  TQ_UNROLL
  for (int i = 0; i < BITS; i++) {
    // Spare bits of a half: bit 0, then the top ones, which may be moved together.
    int spare = remaining * BITS + i;
    int place = spare % (SPARE > 0 ? SPARE : 1);
    if (i > 0 && place > 1) continue;
    int count = place == 0 ? 1 : SPARE - place < BITS - i ? SPARE - place : BITS - i;
    int bit = place == 0 ? 0 : BASE + BITS * PER_HALF + place - 1;
    uint mask = (((1u << count) - 1u) << (i + 1)) * 0x00010001u;
    uint word = words[spare / (SPARE > 0 ? SPARE : 1)];
    spelled = tq_and_or(bit > i ? word >> (bit - i - 1) : word << (i + 1 - bit), mask, spelled);
  }
  return spelled;
}
