// Bytes and bits of two words that windows of a trellis are taken from: the Metal side.
#include "compat/base.h"

// (x & mask) | (y & ~mask)
TQ_FUNC uint tq_select(uint x, uint y, uint mask) { return (x & mask) | (y & ~mask); }
// Byte i of x and byte k of y as the low bytes of halves; the high ones may be anything.
TQ_FUNC uint tq_two_bytes(uint x, int i, uint y, int k) {
  return tq_two_halves(ushort(x >> (8 * i)), ushort(y >> (8 * k)));
}
// Bytes of x and y by turns, x first: their low halves', or their high ones'.
TQ_FUNC uint tq_zip_bytes(uint x, uint y, bool high) {
  ushort a = high ? as_type<ushort2>(x).y : as_type<ushort2>(x).x;
  ushort b = high ? as_type<ushort2>(y).y : as_type<ushort2>(y).x;
  return tq_two_halves(ushort((a & 255) | (b << 8)), ushort((a >> 8) | (b & 0xFF00)));
}
