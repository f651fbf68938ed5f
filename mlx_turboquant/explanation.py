"""`explain`: what a cache stores, layer by layer, and why anything was left alone.

Owns the wording for users. Reads caches by their public properties only.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .cache import BatchTurboQuantCache, TurboQuantCache

#: Why a cache of mlx-lm's is not replaced, by class name.
LEFT_ALONE = {
    "RotatingKVCache": "a sliding window already bounds it",
    "ArraysCache": "recurrent state, not keys and values",
    "ChunkedKVCache": "chunked attention trims its own front",
    "ConcatenateKVCache": "made for blocks that are attended once",
    "QuantizedKVCache": "already quantized by mlx-lm",
    "KVCache": "no compressed cache was asked for",
}


@dataclass(frozen=True)
class LayerReport:
    """One cache entry of a prompt cache.

    Attributes:
        layer: Index in the prompt cache, ``"3.0"`` inside a list of caches.
        cache: Class name.
        spec: The `CacheSpec`'s text, or "" if left alone.
        backend: What computes its attention, and why not a kernel if none does.
        tokens: Sink, packed and recent tokens; empty if unknown.
        nbytes: Bytes of its buffers.
        elements: Key and value elements held; 0 if unknown.
        reason: Why it was left alone, or "".
        returns_arrays: The model computes attention itself, on decoded arrays.
    """

    layer: str
    cache: str
    spec: str = ""
    backend: str = "mlx"
    tokens: tuple[int, ...] = ()
    nbytes: int = 0
    elements: int = 0
    reason: str = ""
    returns_arrays: bool = False


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; ``print`` it for a table."""

    layers: tuple[LayerReport, ...]

    @property
    def packed_layers(self) -> int:
        """Entries that hold packed codes, or will once they are long enough."""
        return sum(1 for row in self.layers if row.spec)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        """Entries that stay in the model's dtype, with their reasons."""
        return tuple(row for row in self.layers if not row.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, spare capacity included."""
        return sum(row.nbytes for row in self.layers)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes the compressed entries' tokens would take in fp16, plus the rest."""
        return sum(2 * r.elements if r.spec else r.nbytes for r in self.layers)

    def summary(self) -> str:
        """One line: bytes, bits per element, how many layers."""
        rows = [row for row in self.layers if row.spec]
        elements = sum(row.elements for row in rows)
        count = f"{len(rows)} of {len(self.layers)} layers"
        if not rows:
            return f"{size_text(self.nbytes)}, uncompressed; try --kv-bits 3"
        specs = _specs_text([row.spec for row in rows])
        if not elements:
            return f"{specs} in {count}, empty"
        bits = 8 * sum(row.nbytes for row in rows) / elements
        return (
            f"{size_text(self.nbytes)} against {size_text(self.fp16_nbytes)} in fp16 "
            f"({_ratio_text(self.fp16_nbytes / self.nbytes)}), {bits:.2f} bits per "
            f"element, {specs} in {count}"
        )

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("layer", "cache", "spec", "backend", box=None)
        table.add_column("sink+packed+recent", justify="right")
        table.add_column("bytes", justify="right")
        table.add_column("bits/el", justify="right")
        table.add_column("left alone because")
        for row in self.layers:
            bits = f"{8 * row.nbytes / row.elements:.2f}" if row.elements else ""
            table.add_row(
                row.layer,
                row.cache,
                row.spec,
                row.backend,
                "+".join(map(str, row.tokens)),
                str(row.nbytes),
                bits,
                row.reason,
            )
        console = Console(file=io.StringIO(), width=120)
        console.print(table)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])

    def __repr__(self) -> str:
        return f"Explanation({self.summary()})"


def explain(cache: Any) -> Explanation:
    """Say per layer which codec, backend and segments are in use.

    Args:
        cache: A prompt cache (list of layer caches) or one layer's cache.
    """
    entries = cache if isinstance(cache, Sequence) else [cache]
    return Explanation(tuple(_rows(entries, "")))


def _rows(entries: Iterable[Any], prefix: str) -> Iterable[LayerReport]:
    for index, entry in enumerate(entries):
        layer = f"{prefix}{index}"
        nested = getattr(entry, "caches", None)
        if nested is not None:
            yield from _rows(nested, f"{layer}.")
        elif isinstance(entry, BatchTurboQuantCache):
            yield from _rows(entry.rows, f"{layer}.")
        elif isinstance(entry, TurboQuantCache):
            yield LayerReport(
                layer,
                type(entry).__name__,
                spec=str(entry.spec),
                backend=_backend(entry),
                tokens=(entry.sink_length, entry.packed_length, entry.recent_length),
                nbytes=entry.nbytes,
                elements=0 if entry.empty() else entry.elements,
                returns_arrays=entry.returns_arrays,
            )
        else:
            name = type(entry).__name__
            reason = getattr(entry, "left_alone", None)
            reason = reason or LEFT_ALONE.get(name, "not a kind we know")
            yield LayerReport(layer, name, nbytes=_nbytes(entry), reason=reason)


def _backend(entry: TurboQuantCache) -> str:
    """What computes the next decoded token, and why it is not a faster backend."""
    choice = entry.choice
    if choice is None:
        return ""
    if not entry.packed_length:
        return "mlx: nothing is packed yet"
    reason = choice.reason
    if entry.returns_arrays:
        reason = "the model computes attention itself, so each step decodes all"
    return f"{choice.backend.name}: {reason}" if reason else choice.backend.name


def _nbytes(entry: Any) -> int:
    try:
        return int(entry.nbytes)
    except (AttributeError, NotImplementedError, TypeError):
        return 0  # some stock caches cannot say while they are empty


def _specs_text(specs: list[str]) -> str:
    """One spec if all layers share it, else the bits of each kind and how many."""
    if len(set(specs)) == 1:
        return specs[0]
    bits = Counter(spec.partition(",")[0] for spec in specs)
    return " ".join(f"{name} x{count}" for name, count in sorted(bits.items()))


def _ratio_text(ratio: float) -> str:
    if ratio >= 1:
        return f"{ratio:.2f}x smaller"
    return f"{1 / ratio:.2f}x larger: the text is still shorter than the buffers"


def size_text(count: float) -> str:
    """Bytes as people read them: ``1.5 MB`` is 1.5e6 bytes."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.2f} GB"
