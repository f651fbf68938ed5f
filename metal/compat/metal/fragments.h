// Fragments of 8x8 simdgroup matrices: a lane holds row `major`, columns 2 * minor and
// 2 * minor + 1 of each.
//
//               minor 0   1   2   3
//     major 0   lane  0   1   8   9
//           1         2   3  10  11
//           2         4   5  12  13
//           3         6   7  14  15
//           4        16  17  24  25
//           5        18  19  26  27
//           6        20  21  28  29
//           7        22  23  30  31
TQ_FUNC uint tq_major(uint lane) { return ((lane / 4u) & 4u) + (lane / 2u) % 4u; }
TQ_FUNC uint tq_minor(uint lane) { return ((lane / 4u) & 2u) + lane % 2u; }
TQ_FUNC uint tq_lane(uint major, uint minor) {
  return (major & 4u) * 4u + (minor & 2u) * 4u + (major & 3u) * 2u + (minor & 1u);
}
// Lanes of one `minor` are these distances of a butterfly apart.
constant constexpr int TQ_MAJOR_STRIDES[3] = {2, 4, 16};
// And lanes of one `major`: those of the other bit 0, and bit 1, of `minor`.
constant constexpr int TQ_MINOR_STRIDES[2] = {1, 8};

// Which lane's fragment of a column has the element 2 column + e of a quarter of a query row,
// and which half of it.
TQ_FUNC uint tq_query_lane(uint row, uint quarter, uint e) {
  return tq_lane(2u * quarter + e, row / 2u);
}
TQ_FUNC int tq_query_half(int row, int) { return row % 2; }

TQ_FUNC void tq_multiply_add(thread float* sum, half2 a, half2 b) {
  simdgroup_matrix<half, 8, 8> left, right;
  simdgroup_matrix<float, 8, 8> total;
  left.thread_elements()[0] = a.x;
  left.thread_elements()[1] = a.y;
  right.thread_elements()[0] = b.x;
  right.thread_elements()[1] = b.y;
  total.thread_elements()[0] = sum[0];
  total.thread_elements()[1] = sum[1];
  simdgroup_multiply_accumulate(total, left, right, total);
  sum[0] = total.thread_elements()[0];
  sum[1] = total.thread_elements()[1];
}
// Logits of tokens `major` and 8 + major, rows 2 * minor and 2 * minor + 1, += key pairs
// p and p + 1 of the first token (low0, low1) and of the second (high0, high1) times the
// query pairs.
TQ_FUNC void tq_logits_product(
    thread float* logits, half2 q0, half2 q1, half2 low0, half2 low1, half2 high0, half2 high1) {
  tq_multiply_add(logits, low0, q0);
  tq_multiply_add(logits, low1, q1);
  tq_multiply_add(logits + 2, high0, q0);
  tq_multiply_add(logits + 2, high1, q1);
}
// Weights as logits lie, (token, two rows), to an operand of the next.
TQ_FUNC half2 tq_weights(half2 weights) { return weights; }
// Sums of an even and an odd element, rows 2 * minor and 2 * minor + 1, += their values
// of 8 tokens times w0, and of the next 8 tokens times w1.
TQ_FUNC void tq_values_product(
    thread float* sums, half2 even0, half2 odd0, half2 even1, half2 odd1, half2 w0, half2 w1) {
  tq_multiply_add(sums, even0, w0);
  tq_multiply_add(sums, even1, w1);
  tq_multiply_add(sums + 2, odd0, w0);
  tq_multiply_add(sums + 2, odd1, w1);
}
