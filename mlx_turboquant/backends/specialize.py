"""What kernels are specialised for, and the constant buffers they take.

A function here returns the same for the life of a cache: templates and arrays that
depend on codecs, transforms, shapes and dtypes only. What changes from page to page is
`decode_step`'s, what changes from token to token is an argument of the launch.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeGuard

import mlx.core as mx

from ..codecs import Codec
from ..codecs.kernel_format import KernelFormat
from ..kernels.tuning import UNTUNED, Tuning
from ..quantizer import Quantizer
from ..rotation import Rotation, SplitRotation
from ..transform import ChannelTransform

LOG2E = math.log2(math.e)
#: Largest head_dim of any kernel: registers and threadgroup memory are laid out for it.
MAX_DIM = 512
#: Query rows of a row tile: ``TILE_ROWS`` of matrix_rows.h.
_ROWS = 8
#: Most query rows by multiply-adds; of values wider than that, one: a lane has 4 sums
#: for each row and unit of its simdgroup's, and Apple's GPUs 128 registers.
_MOST_FMA_ROWS, _FMA_DIM = 4, 256
#: Multiply-adds wherever they can be.
MOST_FMA = Tuning(fma_rows=_MOST_FMA_ROWS)
#: Elements of a unit of values (tiles.h), and the most simdgroups that share them.
_UNIT, _MOST_SIMDGROUPS = 32, 4
#: Head_dim up to which a threadgroup takes two row tiles: beyond, its memory has no
#: room for them.
_TWO_ROW_TILES_DIM = 256
#: Pages that a simdgroup makes the logits of means of: ``MEANS_OF_SIMDGROUP``.
_PAGES = 16
#: Simdgroups to a threadgroup of pass 2.
_MERGE_SIMDGROUPS = 8


def refuse(*codecs: Codec) -> str | None:
    """Why the attention and decode kernels cannot read a codec, or None."""
    for codec in codecs:
        if codec.kernel_format is None:
            return f"codec {codec.spec} has no kernel"
        if codec.dim > MAX_DIM:
            return f"head_dim {codec.dim} is over {MAX_DIM}"
    return None


def format_of(codec: Codec) -> KernelFormat:
    """The format of a codec that `refuse` has nothing against."""
    form = codec.kernel_format
    if form is None:
        raise ValueError(f"codec {codec.spec} has no kernel; see specialize.refuse")
    return form


def rotates_in_kernel(rotation: Rotation | SplitRotation) -> TypeGuard[Rotation]:
    """Whether kernels can apply ``rotation``: Hadamard of a power of two from 32 on."""
    dim = rotation.dim
    return rotation.kind == "hadamard" and dim >= 32 and dim & (dim - 1) == 0


def split_template(
    keys: Quantizer,
    values: Quantizer,
    dtype: mx.Dtype,
    rows: int,
    masked: bool,
    by_fma: int = 0,
    tuning: Tuning = UNTUNED,
) -> list[tuple[str, Any]]:
    """Template of DECODE_SPLIT_KV; ``rows`` are query rows of a KV head.

    ``by_fma``: as `fma_rows` says.
    """
    k_codec, v_codec = keys.codec, values.codec
    k_format, v_format = format_of(k_codec), format_of(v_codec)
    # One table serves both sides, if they have one and it is the same.
    shared = k_codec.spec == v_codec.spec and k_format.has_table
    return [
        ("T", dtype),
        ("DK", k_codec.dim),
        ("DV", v_codec.dim),
        ("MASKED", masked),
        ("ROTATE_K", rotates_in_kernel(k_codec.rotation)),
        ("CENTER", keys.means is not None),
        ("FMA_ROWS", by_fma),
        ("ROW_TILES", row_tiles(keys, values, rows)),
        ("ROW_GROUPS", row_groups(keys, values, rows)),
        ("SHARED_TABLE", shared),
        ("SIMDGROUPS", split_simdgroups(values, tuning)),
        ("K_KIND", k_format.kind),
        ("K_BITS", k_format.bits),
        ("K_TERMS", k_format.terms),
        ("V_KIND", v_format.kind),
        ("V_BITS", v_format.bits),
        ("V_TERMS", v_format.terms),
    ]


def merge_template(
    values: Quantizer,
    dtype: mx.Dtype,
    has_sink_logits: bool,
    tuning: Tuning = UNTUNED,
) -> list[tuple[str, Any]]:
    """Template of MERGE_STATES."""
    return [
        ("T", dtype),
        ("DV", values.codec.dim),
        ("SIMDGROUPS", merge_simdgroups(tuning)),
        ("ROTATE_V", rotates_in_kernel(values.codec.rotation)),
        ("HAS_SINK_LOGITS", has_sink_logits),
    ]


def merge_simdgroups(tuning: Tuning = UNTUNED) -> int:
    """Simdgroups to a threadgroup of pass 2."""
    return tuning.merge_simdgroups or _MERGE_SIMDGROUPS


def units_of(values: Quantizer) -> int:
    """Units of 32 elements that the simdgroups of a threadgroup share."""
    return -(-values.codec.dim // _UNIT)


def split_simdgroups(values: Quantizer, tuning: Tuning = UNTUNED) -> int:
    """Simdgroups to a threadgroup of pass 1: each adds up as many units of values."""
    if tuning.simdgroups is not None:
        return tuning.simdgroups
    units = units_of(values)
    return -(-units // -(-units // _MOST_SIMDGROUPS))


def most_tokens(page: int, simdgroups: int) -> int:
    """Packed tokens of a split that threadgroup memory has the logits of means for.

    Its first page may have begun before it.
    """
    return (_PAGES * simdgroups - 1) * page


def fma_rows(
    values: Quantizer, rows: int, dialect: str, tuning: Tuning = UNTUNED
) -> int:
    """Query rows that pass 1 takes by multiply-adds; 0 for matrix products.

    NVIDIA's tensor cores make products for nothing. Apple's GPUs make them on the ALUs
    and take as long for 1 row as for 8, so a few rows are better multiplied one by one:
    by the model of benchmarks/model_apple.py, **not measured: no Mac has run it**.

    Args:
        values: The values' quantizer.
        rows: Query rows of a KV head.
        dialect: The launcher's name; those that are no GPU take what Metal does.
        tuning: Up to how many rows, where that was measured.
    """
    most = _MOST_FMA_ROWS if values.codec.dim <= _FMA_DIM else 1
    wanted = tuning.fma_rows
    if wanted is None:
        wanted = 0 if dialect == "cuda" else most
    return rows if rows <= min(most, wanted) else 0


def row_tiles(keys: Quantizer, values: Quantizer, rows: int) -> int:
    """Tiles of query rows of a threadgroup of pass 1, which decodes codes once."""
    fits = max(keys.codec.dim, values.codec.dim) <= _TWO_ROW_TILES_DIM
    return 2 if fits and rows > _ROWS else 1


def row_groups(keys: Quantizer, values: Quantizer, rows: int) -> int:
    """Threadgroups that share the query rows of a KV head."""
    return -(-rows // (_ROWS * row_tiles(keys, values, rows)))


def query_scales(keys: Quantizer, scale: float) -> mx.array:
    """From q to logits in log2 units: rotated by a kernel without its norm, and plain.

    (8,) float32, of which the first two count.
    """
    rotation = keys.codec.rotation
    norm = rotation.dim**-0.5 if rotates_in_kernel(rotation) else 1.0
    return _pair(scale * LOG2E * norm, scale * LOG2E)


def query_signs(transform: ChannelTransform, heads: int) -> mx.array:
    """What kernels multiply queries with before rotating, and outputs after it.

    One contiguous row of D for each of ``heads`` (batch times KV heads), float32;
    a `placeholder` if no kernel rotates.
    """
    if not rotates_in_kernel(transform.rotation):
        return placeholder()
    if transform.gains is None:
        return _signs_of_heads(transform.rotation, heads)
    return transform.signs_times_gains


def key_signs(transform: ChannelTransform, heads: int) -> mx.array:
    """What kernels multiply stored vectors with before rotating, as `query_signs`."""
    if not rotates_in_kernel(transform.rotation):
        return placeholder()
    if transform.gains is None:
        return _signs_of_heads(transform.rotation, heads)
    return transform.signs_over_gains


@functools.cache
def placeholder(dtype: mx.Dtype = mx.float32) -> mx.array:
    """Stands for an input that a call has not.

    MLX passes inputs under 8 elements as ``constant``, so it has 8.
    """
    array = mx.zeros((8,), dtype)
    mx.eval(array)
    return array


def stand_in(tokens: mx.array) -> mx.array:
    """For a buffer (B, H, 0, D) of which nothing is read: a `placeholder` of 4 axes."""
    return placeholder(tokens.dtype).reshape(1, 1, 1, -1)


@functools.lru_cache(maxsize=64)
def _pair(first: float, second: float) -> mx.array:
    """A float32 input of two numbers, in 8 elements: see `placeholder`."""
    array = mx.array([first, second, *[0.0] * 6])
    mx.eval(array)
    return array


@functools.lru_cache(maxsize=64)
def _signs_of_heads(rotation: Rotation, heads: int) -> mx.array:
    signs = mx.contiguous(mx.broadcast_to(rotation.signs, (heads, rotation.dim)))
    mx.eval(signs)
    return signs
