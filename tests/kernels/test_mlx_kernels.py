"""The simulator runs MLX's own kernels, from the wheel's headers, as MLX's CPU does."""

import struct

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from helpers import relative_error
from metalsim.mlx_kernels import MLXKernel

QUANTIZED = ["steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"]
METAL = "using namespace metal;"


@pytest.fixture(autouse=True)
def _on_the_cpu(lane):
    if lane != "simulator":
        pytest.skip("about the simulator")


def normal(*shape):
    return np.array(mx.random.normal(shape))


def i32(value):
    return np.array(value, np.int32)


def i64(value):
    return np.array(value, np.int64)


def f32(value):
    return np.array(value, np.float32)


def filled(*shape, dtype=np.float32):
    """An output that nobody can mistake for a result."""
    return np.full(shape, -7, dtype)


def attention(q, k, v, scale):
    q, k, v = (mx.array(x) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


NO_MASK = dict.fromkeys(
    ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask"), False
) | {"has_sinks": False}


def attention_case(tokens, dim):
    q, k, v = normal(1, 4, 1, dim), normal(1, 2, tokens, dim), normal(1, 2, tokens, dim)
    arguments = {
        "queries": q,
        "keys": k,
        "values": v,
        "gqa_factor": i32(2),
        "N": i32(tokens),
        "k_head_stride": i64(tokens * dim),
        "k_seq_stride": i64(dim),
        "v_head_stride": i64(tokens * dim),
        "v_seq_stride": i64(dim),
        "scale": f32(dim**-0.5),
    }
    return arguments, attention(q, k, v, dim**-0.5)


def test_sdpa_vector(mode):
    arguments, want = attention_case(77, 64)
    arguments["out"] = filled(1, 4, 1, 64)
    kernel = MLXKernel(["sdpa_vector.h"], "sdpa_vector", ["float", 64, 64])
    kernel(arguments, (4, 1, 1), (1024, 1, 1), ["out"], NO_MASK)
    assert relative_error(arguments["out"], want) < 2e-6


def test_sdpa_vector_in_two_passes():
    arguments, want = attention_case(300, 64)
    blocks = 32
    partial = {
        "out": filled(1, 4, 1, blocks, 64),
        "sums": filled(1, 4, 1, blocks),
        "maxs": filled(1, 4, 1, blocks),
    }
    first = MLXKernel(["sdpa_vector.h"], "sdpa_vector_2pass_1", ["float", 64, 64])
    first(
        {**arguments, **partial},
        (2, 1, blocks),
        (32, 2, 1),
        list(partial),
        NO_MASK | {"blocks": blocks},
    )
    got = filled(1, 4, 1, 64)
    merge = {"partials": partial.pop("out"), **partial, "out": got}
    merge["blocks"] = i32(blocks)
    second = MLXKernel(["sdpa_vector.h"], "sdpa_vector_2pass_2", ["float", 64])
    second(merge, (4, 1, 1), (1024, 1, 1), ["out"])
    assert relative_error(got, want) < 4e-6


@pytest.mark.parametrize(("name", "width"), [("single_row", 1024), ("looped", 4097)])
def test_softmax(name, width):
    x, got = 3 * normal(4, width), filled(4, width)
    kernel = MLXKernel(["softmax.h"], f"softmax_{name}", ["float", "float"], METAL)
    threads = 1024 if name == "looped" else width // 4
    arguments = {"in": x, "out": got, "axis_size": i32(width)}
    kernel(arguments, (4, 1, 1), (threads, 1, 1), ["out"])
    assert relative_error(got, mx.softmax(mx.array(x), axis=-1)) < 2e-6


def test_logsumexp():
    x, got = 3 * normal(3, 777), filled(3)
    kernel = MLXKernel(["logsumexp.h"], "logsumexp", ["float", "float"], METAL)
    arguments = {"in": x, "out": got, "axis_size": i32(777)}
    kernel(arguments, (3, 1, 1), (224, 1, 1), ["out"])
    assert relative_error(got, mx.logsumexp(mx.array(x), axis=-1)) < 2e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_quantized_vector_product(bits):
    x, w = normal(2, 1024), mx.random.normal((64, 1024))
    words, scales, biases = mx.quantize(w, group_size=64, bits=bits)
    want = mx.quantized_matmul(mx.array(x), words, scales, biases, bits=bits)
    got = filled(2, 64)
    kernel = MLXKernel(QUANTIZED, "affine_qmv_fast", ["float", 64, bits, "false"])
    arguments = {
        "w": np.array(words),
        "scales": np.array(scales),
        "biases": np.array(biases),
        "x": x,
        "y": got,
        "in_vec_size": i32(1024),
        "out_vec_size": i32(64),
    }
    kernel(arguments, (2, 8, 1), (32, 2, 1), ["y"])
    assert relative_error(got, want) < 5e-6


def test_quantized_matrix_product(mode):
    x, w = normal(40, 128), mx.random.normal((64, 128))
    words, scales, biases = mx.quantize(w, group_size=64, bits=4)
    want = mx.quantized_matmul(mx.array(x), words, scales, biases, bits=4)
    got = filled(40, 64)
    template = ["float", 64, 4, "true", "false"]
    kernel = MLXKernel(QUANTIZED, "affine_qmm_t", template)
    arguments = {
        "w": np.array(words),
        "scales": np.array(scales),
        "biases": np.array(biases),
        "x": x,
        "y": got,
        "K": i32(128),
        "N": i32(64),
        "M": i32(40),
    }
    kernel(arguments, (2, 2, 1), (32, 2, 2), ["y"])
    assert relative_error(got, want) < 5e-6


@pytest.mark.parametrize(("bits", "per_thread"), [(4, 2), (8, 1), (3, 8)])
def test_dequantize(bits, per_thread):
    words, scales, biases = mx.quantize(
        mx.random.normal((16, 256)), group_size=32, bits=bits
    )
    want = mx.dequantize(words, scales, biases, group_size=32, bits=bits)
    got = filled(16, 256)
    kernel = MLXKernel(QUANTIZED, "affine_dequantize", ["float", 32, bits])
    arguments = {
        "w": np.array(words).view(np.uint8),
        "scales": np.array(scales),
        "biases": np.array(biases),
        "out": got,
    }
    count = got.size // per_thread
    kernel(arguments, (count // 256, 1, 1), (256, 1, 1), ["out"])
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("dim", [64, 1024])
def test_hadamard(dim):
    x, got = normal(4, dim), filled(4, dim)
    kernel = MLXKernel(["hadamard.h"], "hadamard_n", ["float", dim, 16, 4])
    arguments = {"in": x, "out": got, "scale": f32(dim**-0.5)}
    kernel(arguments, (1, 4, 1), (dim // 16, 1, 1), ["out"])
    want = mx.hadamard_transform(mx.array(x), scale=dim**-0.5)
    assert relative_error(got, want) < 2e-6


def test_sort():
    x, got = normal(3, 900), filled(3, 900)
    template = ["float", "float", "false", 128, 8]
    kernel = MLXKernel(["sort.h"], "block_sort", template, METAL)
    one = dict.fromkeys(("in_stride_sorted_axis", "out_stride_sorted_axis"), i32(1))
    row = dict.fromkeys(("in_stride_segment_axis", "out_stride_segment_axis"), i32(900))
    arguments = {"inp": x, "out": got, "size_sorted_axis": i32(900), **one, **row}
    kernel(arguments, (1, 3, 1), (128, 1, 1), ["out"])
    assert np.array_equal(got, np.array(mx.sort(mx.array(x), axis=-1)))


def test_prefix_sums():
    x, got = normal(2, 3000), filled(2, 3000)
    prelude = METAL + '\n#include "mlx/backend/metal/kernels/binary_ops.h"\n'
    template = ["float", "float", "CumSum<float>", 4, "true", "false"]
    kernel = MLXKernel(["scan.h"], "contiguous_scan", template, prelude)
    arguments = {"in": x, "out": got, "axis_size": i64(3000)}
    kernel(arguments, (1, 2, 1), (256, 1, 1), ["out"])
    assert relative_error(got, mx.cumsum(mx.array(x), axis=-1)) < 5e-6


def test_steel_matrix_product():
    a, b, got = normal(50, 48), normal(48, 64), filled(50, 64)
    layout = "<8i 3q 3i 4x"
    sizes = (50, 64, 48, 48, 64, 64, 2, 2, 0, 0, 0, 0, 3, 1)
    template = ["float", 32, 32, 16, 2, 2, "false", "false", "float"]
    headers = ["steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"]
    kernel = MLXKernel(headers, "gemm", template)
    params = np.frombuffer(struct.pack(layout, *sizes), np.uint8).copy()
    constants = dict.fromkeys(
        ("has_batch", "use_out_source", "do_axpby", "align_M"), False
    ) | {"align_N": True, "align_K": True}
    arguments = {"A": a, "B": b, "D": got, "params": params}
    kernel(arguments, (2, 2, 1), (32, 2, 2), ["D"], constants)
    assert relative_error(got, mx.array(a) @ mx.array(b)) < 5e-6


def test_an_unknown_kernel_is_said():
    with pytest.raises(metalsim.MetalSimError, match="nothing_like_it not found"):
        MLXKernel(["softmax.h"], "nothing_like_it")
