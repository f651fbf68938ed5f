"""What a tuner times: decode attention as a step waits for it, on made-up codes.

Each call's output is the next one's query, so that none overlaps. Calls go from one
cache to the next, as those of a step's layers do: together they are larger than what a
GPU keeps near, and a cache comes from memory as it does in a step.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..backends.call import AttendCall
from ..backends.gpu import Gpu
from ..backends.truth import TOLERANCE
from ..kernels.tuning import UNTUNED, Heads, Tuning
from ..quantizer import Quantizer, Sides
from ..segments import CompressedTokens, PreparedSteps
from ..tiles import in_tiles
from ..tokens import TILE, TokenArrays
from .judge import WrongError
from .key import Subject
from .tuner import LENGTHS

#: Calls of a chain, whose time is divided by them.
CALLS = 20
#: Bytes of codes that calls go through before they are at the first again.
_BYTES = 128 << 20
#: Tokens that are encoded, the others repeat them; and those that are not packed.
_DISTINCT, _SINK, _RECENT = 64, 4, 64

Handles = tuple[CompressedTokens, CompressedTokens]


class Workload:
    """Times decode attention for one subject and one model's heads.

    Args:
        subject: What kernels are specialised for.
        heads: Of one token's step of one sequence.
        backend: What attends.
    """

    def __init__(self, subject: Subject, heads: Heads, backend: Gpu) -> None:
        self._subject, self._heads, self._backend = subject, heads, backend
        self._dtype: mx.Dtype = getattr(mx, subject.dtype)
        mx.random.seed(0)
        self.quantizers = self._quantizers()
        self._caches = {tokens: self._fill(tokens) for tokens in LENGTHS}
        self._prepared: dict[tuple[Tuning, int], list[Handles]] = {}
        self._warm: set[tuple[Tuning, int]] = set()
        self._at = 0

    def seconds(self, tuning: Tuning, tokens: int) -> float:
        """Of one call, by a chain of `CALLS`; compilers and preparations left out."""
        if (tuning, tokens) not in self._warm:
            self._warm.add((tuning, tokens))
            self.seconds(tuning, tokens)
        q = self._query()
        for _ in range(CALLS):
            out = self._attend(tuning, tokens, self._at, q)
            q, self._at = self._as_query(out), self._at + 1
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(q)
        mx.synchronize()
        return (time.perf_counter() - start) / CALLS

    def hold(self, tuning: Tuning) -> None:
        """That a tuning gives what is given without it, but for rounding.

        Raises:
            WrongError: if it does not.
        """
        for tokens in LENGTHS:
            q = self._query()
            want, got = (
                self._attend(t, tokens, 0, q).astype(mx.float32)
                for t in (UNTUNED, tuning)
            )
            ratio: Any = mx.linalg.norm(got - want) / mx.linalg.norm(want)
            error = ratio.item()
            if not error < 2 * TOLERANCE:  # each is that near to the truth; NaN is not
                raise WrongError(f"{tuning}: {error:.2g} from what it was untuned")

    def _attend(
        self, tuning: Tuning, tokens: int, number: int, q: mx.array
    ) -> mx.array:
        caches = self._prepared.get((tuning, tokens))
        if caches is None:
            # What is prepared for a launch is kept with the keys.
            caches = [
                (replace(keys, prepared=PreparedSteps()), values)
                for keys, values in self._caches[tokens]
            ]
            self._prepared[tuning, tokens] = caches
        keys, values = caches[number % len(caches)]
        call = AttendCall(q, keys, values, self._subject.k_dim**-0.5, None, None)
        return self._backend.tuned(tuning).attend(call)

    def _query(self) -> mx.array:
        heads = self._heads.kv_heads * self._heads.rows
        q = mx.random.normal((1, heads, 1, self._subject.k_dim)).astype(self._dtype)
        mx.eval(q)
        return q

    def _as_query(self, out: mx.array) -> mx.array:
        """An output (1, H, 1, Dv) as a query (1, H, 1, Dk)."""
        lacking = self._subject.k_dim - self._subject.v_dim
        if lacking > 0:
            return mx.pad(out, [(0, 0), (0, 0), (0, 0), (0, lacking)])
        return out[..., : self._subject.k_dim]

    def _quantizers(self) -> Sides[Quantizer]:
        subject, kv_heads = self._subject, self._heads.kv_heads
        gains = (
            mx.exp(0.4 * mx.random.normal((1, kv_heads, 1, dim)))
            for dim in (subject.k_dim, subject.v_dim)
        )
        made = subject.quantizers(Sides(*gains))
        means = made.keys.means
        if means is not None:
            pages = -(-max(LENGTHS) // means.page)
            shape = 1, kv_heads, pages, subject.k_dim
            means.append(0.3 * mx.random.normal(shape))
            mx.eval(means.state)
        return made

    def _fill(self, tokens: int) -> list[Handles]:
        """Caches that hold so many packed tokens each, and `_BYTES` together."""
        caches: list[Handles] = []
        nbytes, codes = 0, [self._codes(quantizer) for quantizer in self.quantizers]
        while nbytes < _BYTES:
            sides = []
            for quantizer, some in zip(self.quantizers, codes, strict=True):
                times = tokens // _DISTINCT
                arrays = {n: mx.tile(a, (1, 1, times, 1)) for n, a in some.items()}
                shape = 1, self._heads.kv_heads, _SINK + _RECENT, quantizer.codec.dim
                plain = mx.random.normal(shape).astype(self._dtype)
                sink = mx.contiguous(plain[:, :, :_SINK])
                recent = mx.contiguous(plain[:, :, _SINK:])
                mx.eval(arrays, sink, recent)
                packed = TokenArrays(arrays, tokens, layout=quantizer.layout)
                sides.append(CompressedTokens(quantizer, sink, packed, recent, _RECENT))
                nbytes += packed.nbytes
            caches.append((sides[0], sides[1]))
        return caches

    def _codes(self, quantizer: Quantizer) -> dict[str, mx.array]:
        """Of `_DISTINCT` tokens, whole tiles, in tile order."""
        assert _DISTINCT % TILE == 0
        shape = 1, self._heads.kv_heads, _DISTINCT, quantizer.codec.dim
        codes = quantizer.codec.encode(mx.random.normal(shape))
        arrays = in_tiles(codes, quantizer.layout).arrays
        mx.eval(arrays)
        return arrays
