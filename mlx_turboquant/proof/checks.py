"""What a machine is checked on: every kernel that a cache would use, as it would.

Each check holds a backend to the reference on the CPU in float32, on the same codes,
and to itself: what it says twice must be equal to the bit. The first checks are of the
hardware's `facts`, and by kernels that show little else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from ..backends.call import AttendCall, Mask
from ..backends.reference import Reference
from ..backends.truth import (
    ROW_TOLERANCE,
    attention_as_given,
    codes_as_given,
    rotated_as_given,
    tolerance_of,
)
from ..kernels.kernel import Launcher
from ..quantizer import PageMeans, Quantizer
from ..segments import CompressedTokens
from ..tiles import in_vectors
from ..tokens import TokenArrays
from .data import HEADS, Kind, Source
from .facts import Fact, facts
from .judge import WrongError, hold, truth_of, without_ties
from .key import Subject

#: Times that the longest attention is run to see that it is always the same.
MANY = 50


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What is checked, in words.
        kind: Which kernel, or ``"probe"``.
        run: Holds a backend to the truth and returns its relative error; raises
            `WrongError`, or whatever a kernel that cannot run does.
    """

    name: str
    kind: str
    run: Callable[[Reference], float]


#: packed tokens, query heads a KV head, steps, mask, tokens, times. The rows, heads
#: times steps, are every form that kernels have: 1 to 4 by multiply-adds, a tile of
#: rows, two of them, several threadgroups.
_ATTENTION: tuple[tuple[int, int, int, str | None, Kind, int], ...] = (
    (1, 1, 1, None, "plain", 2),
    (33, 8, 1, None, "plain", 2),
    (257, 1, 1, "blocks", "plain", 2),
    (257, 2, 1, None, "plain", 2),
    (257, 2, 1, "blocks", "decades", 2),
    (257, 3, 1, None, "plain", 2),
    (257, 3, 1, "blocks", "plain", 2),
    (257, 4, 1, None, "decades", 2),
    (257, 4, 1, "blocks", "plain", 2),
    (257, 8, 1, "blocks", "plain", 2),
    (257, 2, 8, "causal", "plain", 2),
    (257, 2, 8, "blocks", "plain", 2),
    (257, 5, 8, "causal", "plain", 2),
    (5000, 1, 1, None, "far", 2),
    (5000, 8, 1, "blocks", "far", 2),
    (5000, 1, 1, None, "decades", MANY),
    (5000, 8, 1, None, "decades", MANY),
)


#: Of the hardware by kernels (3), and of codes, gains and orders (13).
_OTHERS = 16


def how_many(launcher: Launcher | None) -> int:
    """How many checks `all_checks` has, before the data of any is made."""
    return (launcher is not None) + _OTHERS + len(_ATTENTION)


def all_checks(
    subject: Subject, launcher: Launcher | None, note: Callable[[Fact], None]
) -> Iterator[Check]:
    """Every check of a subject, the quickest first; data is made as it goes.

    Args:
        subject: What kernels are specialised for.
        launcher: What runs them; None for a backend without kernels.
        note: Told of each fact of the hardware.
    """
    if launcher is not None:
        yield Check("facts", "probe", partial(_facts, launcher, note))
    with mx.stream(mx.cpu):
        source = Source(subject)
    yield from _probes(source)
    yield from _code_checks(source)
    for packed, group, steps, mask, kind, times in _ATTENTION:
        rows = f"{group * steps} rows" + (f", {mask}" if mask else "")
        yield Check(
            f"attention over {packed} tokens, {rows}, {kind}",
            "attention",
            partial(_attention, source, packed, group, steps, mask, kind, times),
        )


def _facts(
    launcher: Launcher, note: Callable[[Fact], None], backend: Reference
) -> float:
    """Facts of the hardware, whatever the backend makes of them."""
    found = facts(launcher)
    for fact in found:
        note(fact)
    wrong = [str(fact) for fact in found if not fact.holds]
    if wrong:
        raise WrongError("; ".join(wrong))
    return 0.0


def _probes(source: Source) -> Iterator[Check]:
    """Lanes of a simdgroup, and of a matrix fragment, are where kernels expect them."""
    dim = source.subject.k_dim
    with mx.stream(mx.cpu):
        units = mx.broadcast_to(mx.eye(dim), (1, HEADS, dim, dim)).astype(source.dtype)
        mx.eval(units)
    keys = source.quantizers().keys
    yield Check(
        "shuffles in a simdgroup: unit vectors",
        "probe",
        partial(_query_basis, keys, units),
    )
    for group, name in ((8, "matrix products: 8 rows"), (1, "multiply-adds: 1 row")):
        yield Check(
            f"{name}, a tile of tokens",
            "probe",
            partial(_attention, source, 32, group, 1, None, "plain", 2),
        )


def _code_checks(source: Source) -> Iterator[Check]:
    """Of the kernels beside attention, one after the other."""
    page = source.subject.page or 128
    with mx.stream(mx.cpu):
        keys, values = source.handles(257, "plain")
        queries = source.queries(2, 5)
        vectors = []
        for side in (keys, values):
            x = source.normal((1, HEADS, 2 * page, side.quantizer.codec.dim))
            decades = 10 ** mx.random.uniform(
                -3, 1, (1, HEADS, 2 * page, 1), key=source.next_key()
            )
            spread = decades if side.quantizer.means is None else 1.0
            vectors.append((spread * x + 0.5).astype(source.dtype))
        q_page = source.normal((1, 2 * HEADS, page, source.subject.k_dim))
        q_page = q_page.astype(source.dtype)
        outputs = source.normal((1, 2 * HEADS, 5, source.subject.v_dim))
        outputs = outputs.astype(source.dtype)
        mx.eval(queries, vectors, q_page, outputs)
    yield Check("queries", "rotate", partial(_query_basis, keys.quantizer, queries))
    yield Check("outputs", "rotate", partial(_output_basis, values.quantizer, outputs))
    for side, x in zip((keys, values), vectors, strict=True):
        quantizer, name = side.quantizer, side.quantizer.side
        own = x[:, :, :page]
        q = q_page if name == "keys" else None
        centers = quantizer.means is not None
        yield Check(f"gains of {name}", "gains", partial(_gains, own, centers, q))
        if q is not None:
            # Before a text has shown queries, keys are calibrated on themselves.
            yield Check(
                "gains of keys alone", "gains", partial(_gains, own, centers, None)
            )
        yield Check(f"codes of {name}", "encode", partial(_encode, quantizer, x))
        yield Check(f"order of {name}", "order", partial(_order, side))
        yield Check(
            f"{name} for prefill", "materialize", partial(_materialize, source, side)
        )
        yield Check(f"{name} as arrays", "materialize", partial(_dequantize, side))


def _attention(
    source: Source,
    packed: int,
    group: int,
    steps: int,
    mask_kind: str | None,
    kind: Kind,
    times: int,
    backend: Reference,
) -> float:
    with mx.stream(mx.cpu):
        keys, values = source.handles(packed, kind)
        q = source.queries(group, steps)
        mask = _mask(mask_kind, steps, keys.shape[2])
        # Learned sink logits are a kernel of their own: some calls have them.
        logits = source.normal((HEADS * group,)).astype(source.dtype)
        sinks = logits if group in (4, 5) else None
        mx.eval(q, *(a for a in (mask, sinks) if isinstance(a, mx.array)))
        call = AttendCall(q, keys, values, source.subject.k_dim**-0.5, mask, sinks)
    want = [attention_as_given(call)]
    return hold(
        backend,
        lambda b: [b.attend(call)],
        want,
        tolerance_of(call),
        ROW_TOLERANCE,
        times,
    )


def _mask(kind: str | None, steps: int, tokens: int) -> Mask:
    if kind != "blocks":
        return kind
    # Two blocks that are longer than what a threadgroup takes, and single tokens.
    column = mx.arange(tokens)
    seen = (column % 7 != 3) & ((column < 9) | (column >= min(140, tokens // 2)))
    seen = seen & ~((column >= 2000) & (column < 4200))
    return mx.broadcast_to(seen, (1, 1, steps, tokens))


def _query_basis(quantizer: Quantizer, q: mx.array, backend: Reference) -> float:
    def work(b: Reference) -> list[mx.array]:
        return [b.encode_query(quantizer.transform, q)]

    return hold(backend, work, truth_of(work))


def _output_basis(quantizer: Quantizer, out: mx.array, backend: Reference) -> float:
    def work(b: Reference) -> list[mx.array]:
        return [b.decode_output(quantizer.transform, out)]

    return hold(backend, work, truth_of(work))


def _gains(
    x: mx.array, centers: bool, queries: mx.array | None, backend: Reference
) -> float:
    def work(b: Reference) -> list[mx.array]:
        return [b.channel_gains(x, centers, queries)]

    return hold(backend, work, truth_of(work))


def _encode(quantizer: Quantizer, x: mx.array, backend: Reference) -> float:
    """What codes decode to is compared, but for choices that are as good."""
    x_rot = rotated_as_given(quantizer.transform, x)

    def decoded(encode: Callable[[Quantizer], TokenArrays]) -> list[mx.array]:
        means = None if quantizer.means is None else PageMeans(quantizer.means.page)
        fresh = replace(quantizer, means=means)
        codes = encode(fresh)
        mx.eval(codes.arrays)
        with mx.stream(mx.cpu):
            made = [fresh.decode_rot(codes)]
            return made if means is None else [*made, *means.state.values()]

    want = decoded(lambda fresh: codes_as_given(fresh, x))

    def work(b: Reference) -> list[mx.array]:
        first, *means = decoded(lambda fresh: b.encode(fresh, x, 0))
        return [without_ties(first, want[0], x_rot), *means]

    return hold(backend, work, want, row_tolerance=ROW_TOLERANCE)


def _order(side: CompressedTokens, backend: Reference) -> float:
    with mx.stream(mx.cpu):
        assert side.packed is not None
        want = in_vectors(side.packed)
        mx.eval(want.arrays)
    got = backend.arranged(side.quantizer, want)
    mx.eval(got.arrays)
    with mx.stream(mx.cpu):
        same = in_vectors(got).arrays
        if not all(mx.array_equal(same[n], a).item() for n, a in want.arrays.items()):
            raise WrongError("codes are not where they belong")
    return 0.0


def _materialize(source: Source, side: CompressedTokens, backend: Reference) -> float:
    def work(b: Reference) -> list[mx.array]:
        return [
            b.materialize_rot(side, heads, source.dtype)
            for heads in (slice(0, HEADS), slice(1, HEADS))
        ]

    return hold(backend, work, truth_of(work))


def _dequantize(side: CompressedTokens, backend: Reference) -> float:
    def work(b: Reference) -> list[mx.array]:
        return [b.dequantize(side)]

    return hold(backend, work, truth_of(work))
