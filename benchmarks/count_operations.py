"""Instructions and registers of the attention kernel on NVIDIA GPUs, without one.

Compiles the CUDA text of DECODE_SPLIT_KV for sm_90 with nvcc and counts what nvdisasm
prints (the CUDA toolkit has both; the latter is also the package nvidia-cuda-nvdisasm).
For each codec and head_dim, by matrix products (-) and for some numbers of query rows
by multiply-adds, which NVIDIA GPUs do not use: registers a thread and bytes spilled,
instructions of the whole kernel, and those of the loop over tiles of packed tokens.
Counts are static: what a tile seldom does (raising its bounds) is in the loop, too;
what an inner loop does unit by unit, where codes of a tile are over 16 words a lane, is
counted once, so only the others have a count an element (a lane decodes 2 * head_dim of
them).

    python benchmarks/count_operations.py [NVDISASM]
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_turboquant as tq
from mlx_turboquant.backends import specialize
from mlx_turboquant.codecs import codec_for
from mlx_turboquant.codecs.base import Side
from mlx_turboquant.kernels.attention import split_kv_kernel
from mlx_turboquant.kernels.kernel import Kernel
from mlx_turboquant.quantizer import PageMeans, Quantizer
from mlx_turboquant.transform import ChannelTransform

#: Spec, head_dim, and query rows by multiply-adds; 0 for matrix products.
CASES = [
    *[("k3v3", dim, 0) for dim in (64, 128, 256, 512)],
    *[(spec, 128, 0) for spec in ("k2v2", "k4v4", "k8v8", "k3v3,codec=trellis")],
    *[("k3v3", 128, rows) for rows in (1, 2, 3, 4)],
    *[("k3v3", dim, rows) for dim in (64, 256) for rows in (1, 2, 4)],
    ("k3v3", 512, 1),
    *[("k3v3,codec=trellis", 128, rows) for rows in (1, 2, 4)],
]
#: Element types of buffers; all others are float.
TYPES = {
    "k_words": "unsigned",
    "v_words": "unsigned",
    "k_scales": "__half",
    "v_scales": "__half",
    "means": "__half",
    "arguments": "int",
    "tiles": "int",
    **dict.fromkeys(("q", "sink_keys", "sink_values"), "__half"),
    **dict.fromkeys(("recent_keys", "recent_values"), "__half"),
}


def text_of(kernel: Kernel, template: list[tuple[str, Any]]) -> str:
    """The CUDA text of one specialisation, with a signature like MLX's."""
    body = kernel.body("cuda")
    buffers = []
    for name in kernel.inputs:
        buffers.append(f"const {TYPES.get(name, 'float')}* {name}")
        if f"{name}_strides" in body:
            buffers.append(f"const __grid_constant__ Strides {name}_strides")
    buffers += [f"float* {name}" for name in kernel.outputs]
    values = "".join(
        f"constexpr int {name} = {int(value)};\n"
        for name, value in template
        if not isinstance(value, mx.Dtype)
    )
    return (
        "#include <cuda_fp16.h>\n#include <string.h>\n"
        "struct Strides {\n  long at[8];\n  __device__ long operator[](int i) const"
        " { return at[i]; }\n};\n"
        f"{kernel.header('cuda')}\ntypedef __half T;\n{values}"
        f'extern "C" __global__ void attend({", ".join(buffers)}) {{\n{body}\n}}\n'
    )


def template_of(
    spec: str, dim: int, by_fma: int
) -> tuple[Kernel, list[tuple[str, Any]]]:
    """Kernel and template for few query rows a KV head and centred keys."""
    parsed, quantizers = tq.CacheSpec.parse(spec), []
    sides: tuple[Side, ...] = ("keys", "values")
    for side in sides:
        codec = codec_for(getattr(parsed, side), dim, side, 0)
        means = PageMeans(128) if side == "keys" else None
        quantizers.append(
            Quantizer(codec, ChannelTransform(codec.rotation), side, means)
        )
    kinds = [specialize.format_of(quantizer.codec).kind for quantizer in quantizers]
    template = specialize.split_template(*quantizers, mx.float16, 4, False, by_fma)
    return split_kv_kernel(*kinds, by_fma > 0), template


def instructions(cubin: Path, nvdisasm: str) -> tuple[list[str], dict[str, int]]:
    """Instructions of the kernel, and where its labels stand."""
    command = [nvdisasm, "-c", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(found)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(re.sub(r"^@!?U?P\w+\s+", "", match[1].strip()))
    return found, labels


def tile_loop(code: list[str], labels: dict[str, int]) -> collections.Counter[str]:
    """Opcodes of the loop over packed tiles.

    Of innermost loops with loads and exponentials it is the one that takes codes apart;
    the other, if any, is that over tokens that are not packed.
    """
    ranges = []
    for at, instruction in enumerate(code):
        target = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], at + 1) <= at:
            text = " ".join(code[labels[target[1]] : at + 1])
            if "LDG" in text and "MUFU.EX2" in text:
                ranges.append((labels[target[1]], at + 1))
    innermost = [
        (first, end)
        for first, end in ranges
        if not any(
            first <= a and b <= end and (a, b) != (first, end) for a, b in ranges
        )
    ]
    counts = [
        collections.Counter(re.split(r"[. ]", line)[0] for line in code[first:end])
        for first, end in innermost
    ]
    return max(counts, key=lambda opcodes: opcodes["LOP3"])


def main() -> None:
    """Print a line per case, and what its loop consists of."""
    nvdisasm = sys.argv[1] if len(sys.argv) > 1 else "nvdisasm"
    for spec, dim, rows in CASES:
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder) / "attend.cu", Path(folder) / "attend.cubin"
            source.write_text(text_of(*template_of(spec, dim, rows)))
            command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v"]
            # As NVRTC, MLX's compiler, has it anyway.
            command.append("--expt-relaxed-constexpr")
            command += [str(source), "-o", str(cubin)]
            log = subprocess.run(command, capture_output=True, text=True)
            if log.returncode:
                sys.exit(log.stderr)
            code, labels = instructions(cubin, nvdisasm)
        registers, spilled = (
            found[1] if (found := re.search(pattern, log.stderr)) else "?"
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        )
        opcodes = tile_loop(code, labels)
        count = opcodes.total()
        bits = int(spec[1])
        an_element = (
            f" ({count / (2 * dim):.2f} an element)" if bits * dim <= 512 else ""
        )
        print(
            f"{spec:20} {dim:3} {rows or '-'}: {registers:>3} registers,"
            f" {spilled:>4} bytes spilled; {len(code):5}"
            f" instructions, {count:4} in the loop{an_element}"
        )
        print("    " + ", ".join(f"{op} {n}" for op, n in opcodes.most_common(14)))


if __name__ == "__main__":
    main()
