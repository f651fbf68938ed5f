"""`Footprint`: how many bytes caches take at any length, and what that does to speed.

The arithmetic goes from the records of cache entries and a spec to bytes, tokens that
fit and estimated time per token. ``integrations/footprint.py`` makes the records.

Decoding a token reads every active weight and the whole cache once, so at best the
time of a step is that of the bytes read, with codes counted `CodecInfo.read_cost`
times: what decoding them was measured to cost over reading them (NVIDIA H100, one
attention over 131,072 tokens, dev/LOG.md; no Mac has been measured). Launches and host
work are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from rich.filesize import decimal

from .backends.reference import SLICE_BYTES
from .cache.schedule import DECODE_TOKENS, SHORT_TEXT
from .codecs import codec_for, codec_info
from .entries import CacheEntry
from .pages import GROWTH
from .spec import CacheSpec
from .tokens import capacity_of

#: Tokens of a prompt's chunk: mlx-lm's default.
CHUNK = 2048
#: What is computed and what is built beside it: see `pacing`.
IN_FLIGHT = 2
_FP16_BYTES, _FP32_BYTES = 2, 4
_PLAIN_GROWTH = 256  # and mlx-lm's buffers


@dataclass(frozen=True)
class Footprint:
    """A model's memory, known from its config.

    Attributes:
        layers: Its cache entries that hold keys and values, with their shapes.
        weights: Bytes of all weights.
        active: Bytes of the weights that one token reads.
        fixed: Bytes of caches that do not grow, such as recurrent states.
        context: Longest text it was made for, in tokens; None if unknown.
        activations: Bytes that two layers compute of a chunk of `CHUNK` tokens.
    """

    layers: Sequence[CacheEntry]
    weights: int
    active: int
    fixed: int = 0
    context: int | None = None
    activations: int = 256 << 20

    @property
    def itemsize(self) -> int:
        """Bytes of an element that is not compressed."""
        return max((entry.itemsize for entry in self.layers), default=_FP16_BYTES)

    def prompt_bytes(self, tokens: int, spec: CacheSpec | None = None) -> int:
        """Most bytes beside the weights while a prompt of so many tokens is read.

        The caches, two decoded slices, and what two layers compute of a chunk: what
        prompts were measured to need (``benchmarks/bench_memory.py``), within a fifth.
        mlx-lm's own caches hold more layers' activations at once, how many is MLX's.
        """
        return self.cache_bytes(tokens, spec) + self._transient(tokens, spec)

    def _transient(self, tokens: int, spec: CacheSpec | None) -> int:
        decoded = [
            min(max(SLICE_BYTES, plain // entry.shape[0]), plain)
            for entry in self.layers
            if spec is not None and entry.under(spec).is_compressed and entry.shape
            for plain in (_bytes(entry, tokens, None)[0],)
        ]
        return self.activations + IN_FLIGHT * max(decoded, default=0)

    def cache_bytes(
        self, tokens: int, spec: CacheSpec | None = None, chunk: int = 0
    ) -> int:
        """Bytes of the caches of a text, spare capacity included.

        Args:
            tokens: Of the text.
            spec: What is stored; None for mlx-lm's own caches.
            chunk: Tokens that are read at a time, for the most that caches take on the
                way: a window holds a chunk besides itself until the next step, and
                mlx-lm's buffers are longer if chunks do not end where they do.
        """
        return self.fixed + sum(
            _bytes(entry, tokens, spec, chunk)[0] for entry in self.layers
        )

    def code_bytes(self, tokens: int, spec: CacheSpec | None, chunk: int = 0) -> int:
        """Those of `cache_bytes` that are pages of codes of all tokens."""
        return sum(
            _bytes(entry, tokens, spec, chunk)[1]
            for entry in self.layers
            if entry.sliding_window is None
        )

    def tokens_in(self, memory: int, spec: CacheSpec | None = None) -> int:
        """Tokens of one text that fit in ``memory`` bytes beside the weights.

        Bounded by the context; 0 if the weights alone do not fit.
        """
        return self.most_tokens(
            lambda tokens: self.prompt_bytes(tokens, spec), memory - self.weights
        )

    def tokens_in_cache(
        self, memory: int, spec: CacheSpec | None = None, chunk: int = CHUNK
    ) -> int:
        """Tokens of one text whose caches take ``memory`` bytes at most.

        They are counted as `cache_bytes` does with a chunk, as a server that is to keep
        to so many must. Bounded by the context; 0 if not one does.
        """
        return self.most_tokens(
            lambda tokens: self.cache_bytes(tokens, spec, chunk), memory
        )

    def most_tokens(self, bytes_of: Callable[[int], int], room: int) -> int:
        """Tokens of one text for which ``bytes_of`` gives no more than ``room``."""
        low, high = 0, self.context or 1 << 40
        if bytes_of(high) <= room:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            fits = bytes_of(middle) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def speed(self, tokens: int, spec: CacheSpec) -> float | None:
        """Tokens per second after ``tokens`` at best, over those with fp16 caches.

        None for codecs that have not been timed.
        """
        costs = [codec_info(side.name).read_cost for side in (spec.keys, spec.values)]
        timed = [cost for cost in costs if cost is not None]
        if len(timed) < len(costs):
            return None
        parts = [_bytes(entry, tokens, spec) for entry in self.layers]
        code_bytes = sum(part[1] for part in parts)
        plain_bytes = sum(part[0] for part in parts) - code_bytes
        read_always = self.active + self.fixed
        read_fp16 = self.active + self.fixed + self.cache_bytes(tokens)
        return read_fp16 / (read_always + plain_bytes + max(timed) * code_bytes)


def plain_spec(spec: CacheSpec | None) -> CacheSpec | None:
    """A spec to count with: where bits are chosen from the text, about as many."""
    if spec is not None and spec.adaptive:
        return CacheSpec.parse(round(spec.budget or 3))
    return spec


def tight_memory_warning(
    footprint: Footprint, tokens: int, spec: CacheSpec | None, memory_bytes: int
) -> str | None:
    """What to tell a user whose text will not fit; None if it will.

    Args:
        footprint: Sizes of the model.
        tokens: How many the whole text has, the answer included.
        spec: What the caches store; None for mlx-lm's own.
        memory_bytes: What the machine has.
    """
    spec = plain_spec(spec)
    fitting = footprint.tokens_in(memory_bytes, spec)
    if fitting >= min(tokens, footprint.context or tokens):
        return None
    needed = footprint.weights + footprint.prompt_bytes(tokens, spec)
    smaller = ["3"] if spec is None else ["2", "2,codec=trellis"]
    holds = {
        option: footprint.tokens_in(memory_bytes, CacheSpec.parse(option))
        for option in smaller
    }
    best = max(holds, key=lambda option: holds[option])
    hint = f"; --kv-bits {best} holds {holds[best]}" if holds[best] > fitting else ""
    return (
        f"{tokens} tokens need {decimal(needed)} with the weights, this machine has "
        f"{decimal(memory_bytes)}, enough for {fitting}{hint}"
    )


def machine_memory() -> int:
    """Bytes that MLX may use: the GPU's working set, or this machine's memory."""
    info = mx.device_info()
    size = info.get("max_recommended_working_set_size") or info.get("memory_size")
    if size:
        return int(size)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(
    entry: CacheEntry, tokens: int, spec: CacheSpec | None, chunk: int = 0
) -> tuple[int, int]:
    """Bytes of one entry, and how many of them are codes."""
    assert entry.shape is not None, "a footprint's entries hold keys and values"
    heads, k_dim, v_dim = entry.shape
    window = entry.sliding_window
    stored = tokens if window is None else min(tokens, window + chunk)
    plain = heads * (k_dim + v_dim) * entry.itemsize
    if spec is None or not entry.under(spec).is_compressed:
        capacity = stored + (_PLAIN_GROWTH - 1 if chunk else -stored % _PLAIN_GROWTH)
        if entry.kind == "RotatingKVCache" and window is not None:
            capacity = min(capacity, window + chunk)
        return plain * capacity, 0
    quantizable = max(0, stored - spec.sink - spec.window)
    if window is not None and tokens > window:
        quantizable += spec.page  # its first page may be hidden in part
    pages = quantizable // spec.page
    if pages and quantizable < SHORT_TEXT:
        pages = -(-quantizable // spec.page)  # a prompt may have begun another
    capacity = spec.page * capacity_of(pages, max(1, GROWTH // spec.page)) * (pages > 0)
    keys = codec_for(spec.keys, k_dim, "keys")
    values = codec_for(spec.values, v_dim, "values")
    bytes_per_token = (keys.bits_per_vector + values.bits_per_vector) / 8
    if spec.center == "page":
        bytes_per_token += k_dim * _FP16_BYTES / spec.page
    codes = round(heads * capacity * bytes_per_token)
    recent = spec.sink + spec.window + spec.page + DECODE_TOKENS
    gains = heads * (k_dim + v_dim) * _FP32_BYTES
    return plain * (spec.sink + recent) + gains + codes, codes
