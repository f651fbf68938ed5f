"""The kernels that move vectors in and out of codes: their buffers and arguments.

Owns no arithmetic (``metal/encode_scalar.metal``, ``metal/encode_trellis.metal``,
``metal/order_codes.metal``, ``metal/decode_codes.metal``) and no choice of launch sizes
(`backends.gpu`, `backends.code_launches`). Each launch is for one side, keys or values.
"""

from __future__ import annotations

from typing import NamedTuple

from .kernel import Kernel


class EncodeArguments(NamedTuple):
    """What the encoders are told of the vectors besides their templates."""

    #: Tokens to encode.
    tokens: int
    kv_heads: int
    batch: int
    #: The number of the first token, for the mean of its page.
    first: int
    #: Tokens to a row of means.
    page: int


class OrderArguments(NamedTuple):
    """What the kernel that makes tile order is told besides its template."""

    #: Tokens of every head.
    tokens: int


class DecodeArguments(NamedTuple):
    """What the decoder is told of the codes besides its template."""

    #: Tokens to decode.
    tokens: int
    kv_heads: int
    batch: int


_ENCODE_INPUTS = ("x", "signs", "means", "table", "arguments")
#: Codes of coordinates, a simdgroup to a vector.
ENCODE_SCALAR = Kernel(
    name="encode_scalar",
    file="encode_scalar.metal",
    inputs=_ENCODE_INPUTS,
    outputs=("words", "scales"),
    arguments=EncodeArguments,
)
#: Trellis codes, a simdgroup to ``VECTORS`` vectors.
ENCODE_TRELLIS = Kernel(
    name="encode_trellis",
    file="encode_trellis.metal",
    inputs=_ENCODE_INPUTS,
    outputs=("words", "scales"),
    arguments=EncodeArguments,
)
#: Codes from vector order to tile order (`tiles`), a threadgroup to a tile.
ORDER_CODES = Kernel(
    name="order_codes",
    file="order_codes.metal",
    inputs=("words", "scales", "arguments"),
    outputs=("tile_words", "tile_scales"),
    arguments=OrderArguments,
)
#: Codes in tile order to vectors, a thread to a unit of a slot.
DECODE_CODES = Kernel(
    name="decode_codes",
    file="decode_codes.metal",
    inputs=("words", "scales", "params", "arguments"),
    outputs=("out",),
    arguments=DecodeArguments,
)
