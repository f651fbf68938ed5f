// Fragments of m16n8k16 products, two 8x8 blocks to an operand: in each a lane holds row
// `major`, columns 2 * minor and 2 * minor + 1. compat/metal/fragments.h says what each
// function is.
//
//               minor 0   1   2   3
//     major 0   lane  0   1   2   3
//           1         4   5   6   7
//          ..        ..  ..  ..  ..
//           7        28  29  30  31
TQ_FUNC uint tq_major(uint lane) { return lane / 4u; }
TQ_FUNC uint tq_minor(uint lane) { return lane % 4u; }
TQ_FUNC uint tq_lane(uint major, uint minor) { return 4u * major + minor; }
__device__ constexpr int TQ_MAJOR_STRIDES[3] = {4, 8, 16};
__device__ constexpr int TQ_MINOR_STRIDES[2] = {1, 2};

TQ_FUNC uint tq_query_lane(uint row, uint quarter, uint) { return tq_lane(row, quarter); }
TQ_FUNC int tq_query_half(int, int e) { return e; }

TQ_FUNC void tq_multiply_add(
    float* c, half2 a0, half2 a1, half2 a2, half2 a3, half2 b0, half2 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(tq_bits(a0)), "r"(tq_bits(a1)), "r"(tq_bits(a2)), "r"(tq_bits(a3)),
        "r"(tq_bits(b0)), "r"(tq_bits(b1)));
}
TQ_FUNC void tq_logits_product(
    float* logits, half2 q0, half2 q1, half2 low0, half2 low1, half2 high0, half2 high1) {
  tq_multiply_add(logits, low0, high0, low1, high1, q0, q1);
}
TQ_FUNC half2 tq_weights(half2 weights) {
  uint bits = tq_bits(weights);
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(bits));
  return tq_half2(bits);
}
TQ_FUNC void tq_values_product(
    float* sums, half2 even0, half2 odd0, half2 even1, half2 odd1, half2 w0, half2 w1) {
  tq_multiply_add(sums, even0, odd0, even1, odd1, w0, w1);
}
