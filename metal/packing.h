// Where the codes of coordinates lie in a vector's words, as mlx_turboquant/packing.py
// defines it. A word is two 16-bit halves: even elements in low halves, odd ones at the
// same bits of high halves, so that one shift yields both codes of a pair. 16 elements,
// 8 pairs, are a group; two groups are a chunk of BITS words:
//
//     own words of group 0 | own words of group 1 | shared word, if BITS is odd
//     BITS / 2               BITS / 2               bits 0-7 of each half: group 0,
//                                                   bits 8-15: group 1
//
// Pairs fill the own words and the field of the shared word in order, low bits first;
// what is left lies in the spare bits above them. At 3 bits a half of a group is
//
//     own word    bit 15 | 14 - 12 | 11 - 9 | 8 - 6  | 5 - 3  | 2 - 0
//                 a        pair 4    pair 3   pair 2   pair 1   pair 0
//     field       bit 7, 6         | 5 - 3  | 2 - 0
//                 c, b               pair 6   pair 5      pair 7 = bits c b a
//
// A last group without a neighbour has its own words and a shared word to itself.

// Words of a vector.
constexpr int tq_words(int dim, int bits) {
  int groups = (dim + 15) / 16;
  return (groups / 2) * bits + (groups % 2) * ((bits + 1) / 2);
}
