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
    """What both kernels are told about a row of the batch besides their templates.

    Rows of a batch differ in their tokens only: `kv_heads`, `rows`, `steps`, `causal`,
    `tokens_per_split` and `page` are the same in all.
    """

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
    #: Where the first of them is in those.
    first_recent: int
    #: 1 if query i of `steps` does not see the last steps - 1 - i tokens, else 0.
    causal: int
    #: Sink, packed and recent tokens of the batch's longest row.
    longest: int
    #: First tokens that are always seen, if `most_shown` are fewer than there are.
    keep: int
    #: Tokens that a step sees, at most: those behind the first `keep` left a window.
    most_shown: int
    #: Packed tokens to a row of means, a multiple of 32.
    page: int
    #: Which row of the buffers of codes and means has this one's.
    pool_row: int
    #: Entry of `tiles` that is the place of the first tile.
    table: int
    #: Partial results of the rows before this one.
    first_partial: int


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
        "tiles",
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
