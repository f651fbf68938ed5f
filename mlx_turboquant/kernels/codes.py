"""The kernels that move vectors in and out of codes: their buffers and arguments.

Owns no arithmetic (``metal/encode_scalar.metal``, ``metal/encode_trellis.metal``,
``metal/order_codes.metal``, ``metal/materialize.metal``, ``metal/rotate.metal``,
``metal/page_means.metal``, ``metal/channel_gains.metal``) and no choice of launch sizes
(`backends.code_launches`). Each launch is for
one side, keys or values.
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


class MaterializeArguments(NamedTuple):
    """What the kernel that decodes a side is told of it besides its template."""

    #: Tokens of the three segments.
    sink: int
    packed: int
    recent: int
    #: KV heads to decode, of ``all_heads``, from the first one on.
    heads: int
    first_head: int
    all_heads: int
    batch: int
    #: Tokens to a row of means.
    page: int


class RotateArguments(NamedTuple):
    """What the kernel that rotates queries and outputs is told besides its template."""

    #: Of every head.
    tokens: int
    heads: int
    kv_heads: int
    batch: int


class PageMeansArguments(NamedTuple):
    """What the kernel that averages pages is told besides its template."""

    #: Of every head, and the tokens of one.
    pages: int
    page: int
    kv_heads: int
    batch: int


class GainsArguments(NamedTuple):
    """What the kernel that makes channel gains is told besides its template."""

    #: Of the page.
    tokens: int
    kv_heads: int
    #: Query heads of a KV head.
    group: int


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
#: Sink, packed and recent tokens to vectors in the codes' basis.
MATERIALIZE = Kernel(
    name="materialize",
    file="materialize.metal",
    inputs=(
        "words",
        "scales",
        "tiles",
        "params",
        "means",
        "sink",
        "recent",
        "signs",
        "arguments",
    ),
    outputs=("out",),
    arguments=MaterializeArguments,
)
#: Queries into the codes' basis, outputs out of it, a simdgroup to a vector.
ROTATE = Kernel(
    name="rotate",
    file="rotate.metal",
    inputs=("x", "signs", "arguments"),
    outputs=("out",),
    arguments=RotateArguments,
)
#: Means of pages in the codes' basis, a threadgroup to a page.
PAGE_MEANS = Kernel(
    name="page_means",
    file="page_means.metal",
    inputs=("x", "signs", "arguments"),
    outputs=("out",),
    arguments=PageMeansArguments,
)
#: Channel gains of a page, a threadgroup to a head.
CHANNEL_GAINS = Kernel(
    name="channel_gains",
    file="channel_gains.metal",
    inputs=("x", "queries", "arguments"),
    outputs=("gains",),
    arguments=GainsArguments,
)
