"""Attention over compressed tokens in plain mx: runs anywhere, defines what is correct.

While there are codes, q, sink and recent tokens are taken into the codes' basis and the
output out of it. A slice of KV heads at a time is decoded and handed to MLX's own
attention, so the transient never exceeds `SLICE_BYTES` or one KV head, whichever is
more: with 32 layers of 8 heads, one head is 1/256 of the uncompressed cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx

from ..gains import channel_gains, power_of, squares_of_queries
from ..pacing import PACED_TOKENS, pace
from ..quantizer import Quantizer
from ..segments import CompressedTokens
from ..tiles import in_vectors
from ..tokens import Codes, TokenArrays
from ..transform import ChannelTransform
from .call import AttendCall, BatchCall, Mask

#: Bound on the decoded slice and the intermediates of decoding it.
SLICE_BYTES = 256 << 20


class Reference:
    """The protocol of backends, and the one that takes every call.

    Other backends are subclasses that do some of it faster and `refuse` the rest; what
    they do not override is done here. `backends.select` tries them in order.
    """

    @property
    def name(self) -> str:
        """What `explain` calls it."""
        return "reference"

    @property
    def joins(self) -> bool:
        """Whether it attends to several sequences at once."""
        return False

    def refuse(self, keys: Quantizer, values: Quantizer) -> str | None:
        """None: it can attend to anything."""
        return None

    def channel_gains(
        self, x: mx.array, centers: bool = False, queries: mx.array | None = None
    ) -> mx.array:
        """`gains.channel_gains` (B, H, 1, D) of a page of vectors x (B, H, T, D).

        Args:
            x: The vectors.
            centers: Whether their mean is taken off them.
            queries: Those of the page (B, Hq, T, D), for keys; None for none.
        """
        power = None
        if queries is not None:
            power = power_of(squares_of_queries(queries, x.shape[1]))
        return channel_gains(x, centers, power)

    def encode(self, quantizer: Quantizer, x: mx.array, first: int) -> TokenArrays:
        """`Quantizer.encode` of vectors x (B, H, N, D)."""
        return quantizer.encode(x, first)

    def arranged(self, quantizer: Quantizer, codes: TokenArrays) -> TokenArrays:
        """Codes in the order this backend keeps: vector by vector."""
        return in_vectors(codes)

    def decode_rot(
        self, side: CompressedTokens, dtype: mx.Dtype, heads: slice
    ) -> mx.array:
        """The packed tokens (B, heads, N, D) in the codes' basis, means put back."""
        return side.quantizer.decode_rot(packed_of(side), dtype, heads)

    def attend(self, call: AttendCall) -> mx.array:
        """Softmax attention over sink, packed and recent tokens.

        Returns:
            (B, Hq, L, Dv) in q's dtype, not rotated.
        """
        q, keys, values = call.q, call.keys, call.values
        q_rot = self.encode_query(keys.quantizer.transform, q)
        out_rot = self.attend_rot(call._replace(q=q_rot))
        return self.decode_output(values.quantizer.transform, out_rot)

    def attend_batch(self, call: BatchCall) -> mx.array | None:
        """As `attend`, all rows at once; None for a call it takes row by row."""
        return None

    def encode_query(self, transform: ChannelTransform, q: mx.array) -> mx.array:
        """Queries (B, Hq, L, D) in the codes' basis, dtype kept."""
        return transform.encode_query(q).astype(q.dtype)

    def decode_output(self, transform: ChannelTransform, out_rot: mx.array) -> mx.array:
        """Outputs (B, Hq, L, D) out of the codes' basis, dtype kept."""
        return transform.decode(out_rot).astype(out_rot.dtype)

    def attend_rot(self, call: AttendCall) -> mx.array:
        """As `attend`, from q in the keys' basis to the output in the values' basis."""
        q_rot, keys, values = call.q, call.keys, call.values
        kv_heads = keys.shape[1]
        group = q_rot.shape[1] // kv_heads
        outputs = []
        slices = self.slices_of_heads(keys, values, q_rot.dtype)
        for heads in slices:
            q_heads = slice(heads.start * group, heads.stop * group)
            sink_logits = call.sink_logits
            outputs.append(
                mx.fast.scaled_dot_product_attention(
                    q_rot[:, q_heads],
                    self.materialize_rot(keys, heads, q_rot.dtype),
                    self.materialize_rot(values, heads, q_rot.dtype),
                    scale=call.scale,
                    mask=_mask_of_heads(call.mask, q_heads),
                    sinks=None if sink_logits is None else sink_logits[q_heads],
                )
            )
            if len(slices) > 1 and q_rot.shape[2] >= PACED_TOKENS:
                pace(outputs[-1:])
        return mx.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]

    def slices_of_heads(
        self, keys: CompressedTokens, values: CompressedTokens, dtype: mx.Dtype
    ) -> list[slice]:
        """KV heads to decode at once: as many as fit in `SLICE_BYTES`, at least one."""
        batch, heads, length, k_dim = keys.shape
        elements = batch * length * (k_dim + values.shape[-1])
        most = SLICE_BYTES // (elements * self.transient_bytes(dtype))
        count = -(-heads // max(1, most))
        # Alike: a GPU fills with each.
        ends = [-(-heads * i // count) for i in range(count + 1)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def transient_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes that an element takes while it is decoded.

        Codes, float32 levels and product, the result and its concatenation are what
        MLX's allocator was seen to hold at once for float32 models.
        """
        return 20

    def materialize_rot(
        self, side: CompressedTokens, heads: slice, dtype: mx.Dtype
    ) -> mx.array:
        """All tokens of some KV heads (B, heads, T, D) in the codes' basis.

        Args:
            side: Keys or values.
            heads: Which KV heads.
            dtype: Of the result; arithmetic is float32.
        """
        transform = side.quantizer.transform.of_heads(heads)
        parts = []
        if side.sink is not None:
            parts.append(transform.encode(side.sink[:, heads]).astype(dtype))
        if side.packed is not None:
            parts.append(self.decode_rot(side, dtype, heads))
        if side.recent_length:
            recent = side.recent_tokens[:, heads]
            parts.append(transform.encode(recent).astype(dtype))
        return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]

    def dequantize(
        self, side: CompressedTokens, heads: slice = slice(None)
    ) -> mx.array:
        """All stored tokens (B, heads, T, D) in the model's basis and dtype."""
        parts = [] if side.sink is None else [side.sink[:, heads]]
        if side.packed is not None:
            packed_rot = self.decode_rot(side, mx.float32, heads)
            packed = side.quantizer.transform.of_heads(heads).decode(packed_rot)
            parts.append(packed.astype(side.dtype))
        parts.append(side.recent_tokens[:, heads])
        return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        """Itself: caches are copied, machines are not."""
        return self


def packed_of(side: CompressedTokens) -> Codes:
    """The packed tokens of a side that has some.

    Raises:
        ValueError: if it has none; `attend` serves such a side without a backend.
    """
    if side.packed is None:
        raise ValueError("nothing is packed yet; attend to the tokens as they are")
    return side.packed


def _mask_of_heads(mask: Mask, heads: slice) -> Mask:
    if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] > 1:
        return mask[:, heads]
    return mask
