"""The kernels that move tokens in and out of codes: their buffers and entry calls.

Owns no arithmetic (``metal/encode.metal``, ``metal/decode.metal``) and no
choice of launch sizes (`backends.gpu_codes`).
"""

from __future__ import annotations

from .kernel import Kernel

#: Keys and values of a page in one launch, ``SIMDGROUPS`` vectors a threadgroup.
ENCODE_TOKENS = Kernel(
    name="encode_tokens",
    file="encode.metal",
    inputs=(
        "keys",
        "values",
        "k_signs",
        "v_signs",
        "means",
        "k_levels",
        "k_boundaries",
        "v_levels",
        "v_boundaries",
        "inverse_gains",
        "sizes",
    ),
    outputs=("k_words", "k_scales", "v_words", "v_scales"),
    entry="""
    threadgroup float levels[LEVELS];
    threadgroup float boundaries[LEVELS];
    threadgroup uint codes[CODES];
    uint3 place = threadgroup_position_in_grid;
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    bool of_keys = place.y == 0u;
    uint count = of_keys ? 1u << KB : 1u << VB;
    for (uint i = thread_index_in_threadgroup; i < count; i += 32 * SIMDGROUPS) {
      levels[i] = of_keys ? k_levels[i] : v_levels[i];
      if (i + 1u < count) boundaries[i] = of_keys ? k_boundaries[i] : v_boundaries[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    size_t tokens = sizes[0];
    size_t heads = sizes[1];
    size_t vectors = size_t(sizes[2]) * heads * tokens;
    size_t vector = size_t(place.x) * SIMDGROUPS + simdgroup;
    bool there = vector < vectors;
    if (!there) vector = vectors - 1;
    size_t token = vector % tokens;
    size_t head = vector / tokens % heads;
    size_t batch = vector / tokens / heads;
    size_t kv_head = batch * heads + head;
    if (of_keys) {
      size_t row = (sizes[3] + token) / sizes[4];
      encode_vector<T, DK, KB, GAINS, ROTATE_K, CENTER, K_RULE>(
          keys + batch * keys_strides[0] + head * keys_strides[1]
              + token * keys_strides[2],
          k_signs + kv_head * (ROTATE_K ? DK : 0),
          means + (CENTER ? batch * means_strides[0] + head * means_strides[1]
                                + row * means_strides[2] : 0),
          levels, boundaries,
          inverse_gains, codes + simdgroup * (CODES / SIMDGROUPS), there,
          k_words + vector * tq_words(DK, KB), k_scales + vector, lane);
    } else {
      encode_vector<T, DV, VB, GAINS, ROTATE_V, false, V_RULE>(
          values + batch * values_strides[0] + head * values_strides[1]
              + token * values_strides[2],
          v_signs + kv_head * (ROTATE_V ? DV : 0), means, levels, boundaries,
          inverse_gains, codes + simdgroup * (CODES / SIMDGROUPS), there,
          v_words + vector * tq_words(DV, VB), v_scales + vector, lane);
    }
    """,
)
#: One side of a page as trellis codes, a simdgroup to ``VECTORS`` vectors.
ENCODE_TRELLIS = Kernel(
    name="encode_trellis",
    file="encode_trellis.metal",
    inputs=("x", "signs", "means", "table", "sizes"),
    outputs=("words", "scales"),
    entry="""
    // Read four at a time, which have to lie on multiples of 16 bytes.
    threadgroup float4 step_quads[COUNT * VECTORS * SIMDGROUPS / 4];
    threadgroup float4 cost_quads[2 * COSTS * SIMDGROUPS / 4];
    threadgroup float* steps = (threadgroup float*)step_quads;
    threadgroup float* costs = (threadgroup float*)cost_quads;
    threadgroup uint history[4 * COUNT * VECTORS * SIMDGROUPS];
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    size_t tokens = sizes[0];
    size_t heads = sizes[1];
    size_t vectors = size_t(sizes[2]) * heads * tokens;
    size_t first = threadgroup_position_in_grid.x * size_t(SIMDGROUPS) + simdgroup;
    first *= VECTORS;
    if (first >= vectors) return;
    size_t there = vectors - first < VECTORS ? vectors - first : VECTORS;
    size_t places[VECTORS];
    size_t sign_places[VECTORS];
    size_t mean_places[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      size_t vector = first + (size_t(v) < there ? v : 0);
      size_t token = vector % tokens;
      size_t head = vector / tokens % heads;
      size_t batch = vector / tokens / heads;
      places[v] = batch * x_strides[0] + head * x_strides[1] + token * x_strides[2];
      sign_places[v] = ROTATE ? (batch * heads + head) * DIM : 0;
      mean_places[v] = CENTER ? batch * means_strides[0] + head * means_strides[1]
                                    + (sizes[3] + token) / sizes[4] * means_strides[2]
                              : 0;
    }
    encode_trellis<T, DIM, COUNT, EVEN, ODD, VECTORS, ROTATE, CENTER, RULE>(
        x, signs, means, places, sign_places, mean_places, int(there), table,
        steps + COUNT * VECTORS * simdgroup, costs + 2 * COSTS * simdgroup,
        history + 4 * COUNT * VECTORS * simdgroup,
        words + first * (COUNT * (EVEN + ODD) / 64), scales + first, lane);
    """,
)
#: One side's codes to vectors, a thread to a group.
DECODE_TOKENS = Kernel(
    name="decode_tokens",
    file="decode.metal",
    inputs=("words", "scales", "given", "sizes"),
    outputs=("out",),
    entry="""
    size_t groups = (DIM + 15) / 16;
    size_t index = size_t(threadgroup_position_in_grid.x) * THREADS
                   + thread_index_in_threadgroup;
    size_t tokens = sizes[0];
    size_t heads = sizes[1];
    size_t vector = index / groups;
    if (vector >= size_t(sizes[2]) * heads * tokens) return;
    size_t token = vector % tokens;
    size_t head = vector / tokens % heads;
    size_t batch = vector / tokens / heads;
    const device uint* first = words + batch * words_strides[0]
        + head * words_strides[1] + token * words_strides[2];
    decode_group<KIND, T, DIM, BITS, TERMS>(
        first,
        scales + batch * scales_strides[0] + head * scales_strides[1]
            + token * scales_strides[2],
        given, uint(index % groups), out + vector * DIM);
    """,
)
