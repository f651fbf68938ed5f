"""What several tests measure with: paths, float64 attention, relative error."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_turboquant as tq
from mlx_turboquant.backends import select, specialize
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.segments import CompressedKV
from mlx_turboquant.tiles import in_tiles

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "books-20m"


def softmax_attention(q, k, v, scale, mask=None, sinks=None):
    """Float64 attention in numpy: what every backend is held to.

    q (B, Hq, L, Dk), k and v (B, H, T, .); mask as for `tq.attend`.
    """
    q, k, v = (np.array(a, dtype=np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = q @ k.swapaxes(-1, -2) * scale
    length, total = logits.shape[-2:]
    if isinstance(mask, str):
        mask = np.arange(total)[None] <= np.arange(total - length, total)[:, None]
    if mask is not None:
        mask = np.array(mask)
        logits = (
            np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
        )
    if sinks is not None:
        column = np.array(sinks, dtype=np.float64)[None, :, None, None]
        column = np.broadcast_to(column, (*logits.shape[:3], 1))
        logits = np.concatenate([logits, column], axis=-1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., :total] @ v


def stored(side):
    """The vectors that a `CompressedTokens` stands for, float32, unrotated."""
    if side.packed is None:
        return side.recent_tokens.astype(mx.float32)
    whole_rot = Reference().materialize_rot(side, slice(None), mx.float32)
    return side.quantizer.transform.decode(whole_rot)


def in_tile_order(side):
    """The same tokens with codes as GPU kernels read them."""
    if side.packed is None:
        return side
    return replace(side, packed=in_tiles(side.packed, side.quantizer.layout))


class InTiles(Reference):
    """The reference on codes in tile order, which it keeps as `Gpu` does."""

    name = "tiles"

    def refuse(self, keys, values):
        return specialize.refuse(keys.codec, values.codec)

    def encode(self, quantizer, x, first):
        return self.arranged(quantizer, quantizer.encode(x, first))

    def arranged(self, quantizer, codes):
        return in_tiles(codes, quantizer.layout)


class Joining(InTiles):
    """Has batches take their steps together, and attends to them row by row."""

    joins = True

    def attend_batch(self, call):
        """Codes of all rows are where the first ones' are: kernels take it so."""
        for side in (call.keys, call.values):
            packed = [row.packed for row in side.rows if row.packed is not None]
            assert len({id(codes.arrays) for codes in packed}) <= 1


@contextmanager
def backend(chosen):
    """Caches that choose a backend meanwhile choose this one; None for the CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "gpu_backend", lambda: chosen)
        patch.setattr(select, "DEFAULT_ON", (getattr(chosen, "name", ""),))
        patch.setattr(select, "NEED_PROOF", ())
        yield


def attend(q, keys, values, scale, mask=None, sinks=None):
    """What mlx-lm's models do through the hook: attend, then show the queries."""
    out = tq.attend(q, keys, values, scale, mask, sinks)
    if isinstance(keys, CompressedKV) and keys.observer is not None:
        keys.observe_queries(q, scale)
    return out


def relative_error(got, want):
    """Root of the relative squared error, over all elements."""
    got, want = np.array(got, dtype=np.float64), np.array(want, dtype=np.float64)
    return float(np.sqrt(((got - want) ** 2).sum() / (want**2).sum()))
