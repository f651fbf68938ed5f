// Bytes and bits of two words that windows of a trellis are taken from: the CUDA side.
#include "compat/base.h"

TQ_FUNC uint tq_select(uint x, uint y, uint mask) {
  uint result;
  asm("lop3.b32 %0, %1, %2, %3, 0xE2;" : "=r"(result) : "r"(x), "r"(mask), "r"(y));
  return result;
}
TQ_FUNC uint tq_two_bytes(uint x, int i, uint y, int k) {
  return __byte_perm(x, y, 0x4040 | uint(i) | uint(4 + k) << 8);
}
TQ_FUNC uint tq_zip_bytes(uint x, uint y, bool high) {
  return __byte_perm(x, y, high ? 0x7362 : 0x5140);
}
