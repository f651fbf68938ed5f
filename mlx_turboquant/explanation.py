"""`explain`: what a cache stores, layer by layer, and why anything was left alone.

Reads caches by their public properties, and the records that a `PromptCache` carries.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .backends import proved, select
from .cache import BatchTurboQuantCache, TurboQuantCache
from .entries import CacheEntry, PromptCache, kind_reason, nbytes_of
from .proof import ledger


@dataclass(frozen=True)
class LayerReport:
    """What one entry of a prompt cache holds now.

    Attributes:
        layer: Index in the prompt cache, ``"3.0"`` inside a list of caches.
        cache: Class name.
        spec: The `CacheSpec`'s text, or "" if left alone.
        backend: What computes its attention, and why not a kernel if none does.
        tokens: Sink, packed and recent tokens; empty if unknown.
        nbytes: Bytes of its buffers.
        shared_nbytes: Those of them that other caches hold, too.
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
    shared_nbytes: int = 0
    elements: int = 0
    reason: str = ""
    returns_arrays: bool = False


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; ``print`` it for a table.

    Attributes:
        layers: What each entry holds.
        uncompiled: Why a compiled model takes its steps as they are; "" if there is
            nothing to say.
    """

    layers: tuple[LayerReport, ...]
    uncompiled: str = ""

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
            return f"{decimal(self.nbytes)}, uncompressed; try --kv-bits 3"
        specs = _specs_text([row.spec for row in rows])
        if not elements:
            return f"{specs} in {count}, empty"
        bits = 8 * sum(row.nbytes for row in rows) / elements
        return (
            f"{decimal(self.nbytes)} against {decimal(self.fp16_nbytes)} in fp16 "
            f"({_ratio_text(self.fp16_nbytes / self.nbytes)}), {bits:.2f} bits per "
            f"element, {specs} in {count}"
            + (f", {decimal(self.shared_nbytes)} shared" if self.shared_nbytes else "")
        )

    @property
    def shared_nbytes(self) -> int:
        """Bytes that other caches hold, too; they are part of `nbytes`."""
        return sum(row.shared_nbytes for row in self.layers)

    def __str__(self) -> str:
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
        lines = [table_text(table, width=120)]
        if self.uncompiled:
            lines.append(f"steps are not compiled: {self.uncompiled}")
        return "\n".join([*lines, self.summary()])

    def __repr__(self) -> str:
        return f"Explanation({self.summary()})"


def explain(cache: Any) -> Explanation:
    """Say per layer which codec, backend and segments are in use.

    Args:
        cache: A prompt cache (list of layer caches) or one layer's cache.
    """
    caches = cache if isinstance(cache, Sequence) else [cache]
    known = cache if isinstance(cache, PromptCache) else PromptCache(caches, ())
    rows = _rows(caches, {entry.label: entry for entry in known.entries})
    return Explanation(tuple(rows), known.uncompiled)


def _rows(
    caches: Iterable[Any], entries: Mapping[str, CacheEntry], prefix: str = ""
) -> Iterator[LayerReport]:
    for index, cache in enumerate(caches):
        label = f"{prefix}{index}"
        nested = getattr(cache, "caches", None)
        if nested is not None:
            yield from _rows(nested, entries, f"{label}.")
        elif isinstance(cache, BatchTurboQuantCache):
            yield from _rows(cache.rows, entries, f"{label}.")
        elif isinstance(cache, TurboQuantCache):
            yield LayerReport(
                label,
                type(cache).__name__,
                spec=str(cache.spec),
                backend=_backend(cache),
                tokens=(cache.sink_length, cache.packed_length, cache.recent_length),
                nbytes=cache.nbytes,
                shared_nbytes=cache.shared_nbytes,
                elements=0 if cache.empty() else cache.elements,
                returns_arrays=cache.returns_arrays,
            )
        else:
            kind, entry = type(cache).__name__, entries.get(label)
            # A list can change under its records: one of another class says nothing.
            reason = entry.reason if entry is not None and entry.kind == kind else ""
            reason = reason or kind_reason(kind)
            yield LayerReport(label, kind, nbytes=nbytes_of(cache), reason=reason)


def _backend(cache: TurboQuantCache) -> str:
    """What computes the next decoded token, and why it is not a faster backend."""
    choice = cache.choice
    if choice is None:
        return ""
    if not cache.packed_length:
        return "mlx: nothing is packed yet"
    name, reason = choice.backend.name, choice.reason
    if choice.tuned:
        name += f", tuned: {choice.tuned}"
    verdict = proved.verdict_of(choice.proof)
    if verdict is not None and not verdict.is_ok:
        name, reason = select.reference_backend().name, ledger.words(verdict)
    elif cache.returns_arrays:
        reason = "the model computes attention itself, so each step decodes all"
    elif verdict is not None:
        reason = f"proved {verdict.history}"
    return f"{name}: {reason}" if reason else name


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


def table_text(table: Table, width: int) -> str:
    """A table as plain text, without spaces at the ends of lines."""
    paper = io.StringIO()
    # In a notebook a console would show the table there, and nothing on the paper.
    console = Console(
        file=paper,
        width=width,
        color_system=None,
        highlight=False,
        force_jupyter=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in paper.getvalue().splitlines())
