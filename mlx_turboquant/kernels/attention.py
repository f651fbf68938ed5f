"""The two kernels of decode attention: their buffers and their arguments.

Owns no arithmetic (``metal/decode_attention.metal``, ``metal/merge_states.metal``) and
no choice of launch sizes (`backends.decode_step`).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

from .kernel import Kernel


class AttendArguments(NamedTuple):
    """What both kernels are told about a step besides their templates."""

    #: Packed tokens in use.
    packed: int
    #: Runs of packed tokens, a threadgroup and a partial result per KV head each.
    splits: int
    #: Packed tokens to a split, a multiple of 32 times its simdgroups; the last may
    #: have fewer.
    tokens_per_split: int
    #: Runs of sink and recent tokens, likewise, of 32 tokens to a simdgroup. Their
    #: partial results are the first ones.
    plain_splits: int
    kv_heads: int
    #: Query rows per KV head: query heads to a KV head, times `steps`.
    rows: int
    #: Query rows per query head: tokens of this step.
    steps: int
    #: Tokens before the packed ones, kept as the model gave them.
    sink: int
    #: Tokens behind the packed ones, in use of the recent buffers.
    recent: int
    #: 1 if query i of `steps` does not see the last steps - 1 - i tokens, else 0.
    causal: int
    #: Columns of the mask: sink, packed and recent tokens.
    mask_columns: int
    #: Packed tokens to a row of means, a multiple of 32.
    page: int


#: Pass 1: unnormalised attention of each split of the tokens (split-KV).
DECODE_SPLIT_KV = Kernel(
    name="decode_split_kv",
    file="decode_attention.metal",
    inputs=(
        "q",
        "k_words",
        "k_scales",
        "v_words",
        "v_scales",
        "sink_keys",
        "sink_values",
        "recent_keys",
        "recent_values",
        "mask",
        "means",
        "k_params",
        "v_params",
        "k_signs",
        "q_scale",
        "arguments",
    ),
    outputs=("partial_out", "partial_lse"),
    arguments=AttendArguments,
)
#: Pass 2: merges the splits' softmax states, in one basis.
MERGE_STATES = Kernel(
    name="merge_states",
    file="merge_states.metal",
    inputs=(
        "partial_out",
        "partial_lse",
        "sink_logits",
        "v_signs",
        "arguments",
    ),
    outputs=("out",),
    arguments=AttendArguments,
)

#: Where the formats are, by kind: POLYNOMIAL, PAIRS, TRELLIS, ANGLES.
_FORMAT_FILES = (
    "format_polynomial.h",
    "format_points.h",
    "format_trellis.h",
    "format_points.h",
)


#: Where products are, by matrices or by multiply-adds.
_ROWS_FILES = ("matrix_rows.h", "fma_rows.h")


@functools.cache
def split_kv_kernel(k_kind: int, v_kind: int, multiply_adds: bool) -> Kernel:
    """`DECODE_SPLIT_KV` without the formats that neither keys nor values have.

    And without the products that are not made. Both are up to a third of its text,
    which MLX reads through on every launch.
    """
    needed = {_FORMAT_FILES[k_kind], _FORMAT_FILES[v_kind], _ROWS_FILES[multiply_adds]}
    omitted = frozenset((*_FORMAT_FILES, *_ROWS_FILES)) - needed
    return replace(DECODE_SPLIT_KV, omitted=omitted)
