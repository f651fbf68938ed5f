"""How far attention over codes can be from attention over what they stand for.

A cache that kept the norm of each vector's residual, one byte a vector, could say of
every answer how large its error is at most, without the vectors themselves. With

    d_t = scale |q| r_t        at most how far a logit is off; r_t, of a key's residual
    p_t                        the weight that the codes give token t
    s_t                        the norm of a value's residual

a true weight is between w_t and u_t, the weights when token t's logit is off by d_t one
way and all others' by theirs the other way. True weights sum to one, so what some gain
the others lose, and an output (``out``, of decoded values v_t) is off by at most

    the most that weight moved up, and as much moved down, makes of |v_t - out|,
      or what all weights moved as far as they can make of it, if that is less
    + the most that weights between w_t and u_t with the sum of one make of s_t

Certain bounds suppose that all residuals point the worst way. After a random rotation
they point anywhere: q . e has the standard deviation |q| r_t / sqrt(dim), from which
``expected`` is computed, to first order. Both are a diagnostic: caches store no norms,
here they are taken from a copy of what the model gave.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attention import dequantize
from ..cache import TurboQuantCache
from ..errors import UnsupportedModelError
from ..integrations.factory import make_prompt_cache
from ..integrations.stock import replace_plain
from ..segments import CompressedTokens
from ..spec import CacheSpec
from .needles import read

#: Stored norms are powers of 2**(1/8), rounded up: 4% more than they are, on average.
_STEPS, _LARGEST = 8, 127
#: Tokens of a text whose length no plan says.
TOKENS = 1024
#: Decode steps behind a text whose attention is bounded.
STEPS = 8

Array = np.ndarray[Any, Any]


class Errors(NamedTuple):
    """Norms (Hq,) of the error of each head's output, in float64.

    Attributes:
        true: What it is.
        expected: What residuals of any direction would make of it.
        bound: What it is at most.
        size: The norm of the exact output.
    """

    true: Array
    expected: Array
    bound: Array
    size: Array


def stored_norms(norms: Array) -> Array:
    """Norms as one byte each would keep them: never smaller, at most 9.1% larger.

    Zero is kept (uncompressed tokens), and what is below 2**-15.9 counts as that.

    Raises:
        ValueError: for a norm above the largest.
    """
    smallest = 2.0 ** (-_LARGEST / _STEPS)
    codes = np.ceil(_STEPS * np.log2(np.maximum(norms, smallest)) - 1e-9)
    if codes.max(initial=0) > _LARGEST:
        raise ValueError(f"norm {norms.max():g} is above 2**15.9, the largest stored")
    # The last factor: logarithms are rounded.
    kept = 2.0 ** (codes / _STEPS) * (1 + 1e-9)
    return np.where(norms == 0, 0.0, kept)


def output_errors(
    q: Array,
    keys: Array,
    values: Array,
    decoded_keys: Array,
    decoded_values: Array,
    scale: float,
) -> Errors:
    """The error of attention of one query, and its bound by residual norms alone.

    Keys may be in any basis that keeps q . k, such as that of the codes, whose
    residuals point anywhere.

    Args:
        q: Queries (H, group, Dk) of one token, by KV head.
        keys: Exact keys (H, T, Dk).
        values: Exact values (H, T, Dv).
        decoded_keys: The codes' keys (H, T, Dk).
        decoded_values: The codes' values (H, T, Dv).
        scale: Factor on the logits.
    """
    q, keys, values, decoded_keys, decoded_values = (
        x.astype(np.float64) for x in (q, keys, values, decoded_keys, decoded_values)
    )
    exact = np.exp(_log_softmax(scale * q @ keys.swapaxes(1, 2))) @ values
    log_weights = _log_softmax(scale * q @ decoded_keys.swapaxes(1, 2))
    weights = np.exp(log_weights)
    out = weights @ decoded_values
    # From here on, nothing of the exact vectors but two norms a token is used.
    key_norms = stored_norms(np.linalg.norm(keys - decoded_keys, axis=-1))
    value_norms = stored_norms(np.linalg.norm(values - decoded_values, axis=-1))
    off = scale * np.linalg.norm(q, axis=-1)[..., None] * key_norms[:, None]
    least, most = _weight_range(log_weights, off)
    spread = decoded_values[:, None] - out[:, :, None]
    far = np.linalg.norm(spread, axis=-1)  # (H, group, T)
    up, down = (np.maximum(x, 0.0) for x in (most - weights, weights - least))
    moved = np.minimum(up.sum(-1), down.sum(-1))
    spare = np.broadcast_to(value_norms[:, None], far.shape)
    by_weights = np.minimum(
        _most_of(far, up, moved) + _most_of(far, down, moved),
        np.sum(np.maximum(up, down) * far, axis=-1),
    )
    bound = (
        by_weights
        + np.sum(least * spare, axis=-1)
        + _most_of(spare, most - least, 1 - least.sum(-1))
    )
    logit_variance = off**2 / q.shape[-1]
    by_token = weights**2 * (logit_variance * far**2 + value_norms[:, None] ** 2)
    return Errors(
        true=np.linalg.norm(exact - out, axis=-1).reshape(-1),
        expected=np.sqrt(by_token.sum(-1)).reshape(-1),
        bound=bound.reshape(-1),
        size=np.linalg.norm(exact, axis=-1).reshape(-1),
    )


def _log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def _weight_range(log_weights: Array, off: Array) -> tuple[Array, Array]:
    """The least and the most that true weights can be, with logits ``off`` by that."""
    up, down = log_weights + off, log_weights - off
    return _share(down, _others(up)), _share(up, _others(down))


def _share(own: Array, others: Array) -> Array:
    """exp(own) / (exp(own) + exp(others))."""
    return np.asarray(1 / (1 + np.exp(np.minimum(others - own, 700.0))))


def _others(logs: Array) -> Array:
    """The logarithm of the sum of all others (..., T).

    Not of a difference: what is left of that beside one large weight is rounding.
    """
    before, after = (np.full_like(logs, -np.inf) for _ in range(2))
    before[..., 1:] = np.logaddexp.accumulate(logs, axis=-1)[..., :-1]
    backwards = np.logaddexp.accumulate(logs[..., ::-1], axis=-1)[..., ::-1]
    after[..., :-1] = backwards[..., 1:]
    return np.asarray(np.logaddexp(before, after))


def _most_of(gains: Array, room: Array, budget: Array) -> Array:
    """The largest sum of gain * share over the last axis, with shares that fit.

    Args:
        gains: Of a share at each place (..., T).
        room: The largest share of each place (..., T).
        budget: The sum of all shares (...) at most.
    """
    order = np.argsort(-gains, axis=-1)
    room = np.take_along_axis(room, order, axis=-1)
    before = np.cumsum(room, axis=-1) - room
    share = np.clip(budget[..., None] - before, 0.0, room)
    return np.asarray(
        np.sum(np.take_along_axis(gains, order, axis=-1) * share, axis=-1)
    )


class WatchedCache(TurboQuantCache):
    """A cache that keeps what it was given, and bounds the errors of decode steps.

    Attributes:
        exact: Keys and values of all tokens as the model gave them.
        errors: Of each query head and decode step watched, in order.
        is_watching: Whether steps are watched.
    """

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        self.exact: list[tuple[mx.array, mx.array]] = []
        self.errors: list[Errors] = []
        self.is_watching = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As `TurboQuantCache.update_and_fetch`."""
        self.exact.append((keys, values))
        return super().update_and_fetch(keys, values)

    def compressed(self) -> tuple[CompressedTokens, CompressedTokens]:
        """Handles that show this cache the queries of each step."""
        keys, values = super().compressed()
        return replace(keys, observer=self), values

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Bound the error of the step just taken, if it is watched.

        Args:
            q: Queries (1, Hq, 1, D).
            scale: Factor on the logits.
        """
        super().observe_queries(q, scale)
        keys, values = self.compressed()
        if not self.is_watching or keys.packed is None:
            return
        exact = [
            mx.concatenate(list(side), axis=2) for side in zip(*self.exact, strict=True)
        ]
        into = keys.quantizer.transform
        decoded = dequantize(keys, values)
        heads = exact[0].shape[1]
        q_rot = np.array(into.encode_query(q)[0, :, 0])
        keys_rot, values_exact, decoded_keys_rot, decoded_values = (
            np.array(x[0].astype(mx.float32))
            for x in (
                into.encode(exact[0]),
                exact[1],
                into.encode(decoded[0]),
                decoded[1],
            )
        )
        grouped = q_rot.reshape(heads, -1, q_rot.shape[-1])
        errors = output_errors(
            grouped, keys_rot, values_exact, decoded_keys_rot, decoded_values, scale
        )
        self.errors.append(errors)


def measure(
    model: nn.Module, tokens: list[int], spec: CacheSpec, prefill: int
) -> list[dict[str, float]]:
    """Errors and their bounds in the last decode steps of a text.

    Args:
        model: The model.
        tokens: The text; its last `STEPS` tokens are read one by one.
        spec: The cache. Bits that it chooses from the text are chosen by each layer
            alone.
        prefill: Tokens read at a time before them.

    Returns:
        For each layer, relative to the outputs' norms and as root mean squares over
        steps and heads: ``true``, ``expected``, ``bound``; and the least quotient of a
        bound and its error, ``least``.

    Raises:
        UnsupportedModelError: if no layer attends to codes by our attention.
    """
    make_prompt_cache(model, spec)  # puts the hook into the model's attention
    caches = replace_plain(model, lambda: WatchedCache(spec))
    read(model, tokens[:-STEPS], caches, prefill)
    watched = [cache for cache in caches if isinstance(cache, WatchedCache)]
    for cache in watched:
        cache.is_watching = True
    read(model, tokens[-STEPS:], caches, 1)
    if not any(cache.errors for cache in watched):
        raise UnsupportedModelError(
            f"no attention over codes was seen in {len(tokens)} tokens",
            "give a longer text, or a model that `tq.explain` says is compressed",
        )
    return [_summary(cache.errors) for cache in watched if cache.errors]


def _summary(errors: list[Errors]) -> dict[str, float]:
    true, expected, bound, size = (
        np.concatenate(part) for part in zip(*errors, strict=True)
    )
    power = np.mean(size**2)
    relative = {
        name: float(np.sqrt(np.mean(part**2) / power))
        for name, part in (("true", true), ("expected", expected), ("bound", bound))
    }
    return {**relative, "least": float(np.min(bound / np.maximum(true, 1e-300)))}
