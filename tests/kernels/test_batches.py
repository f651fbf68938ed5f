"""Batches of sequences of unlike lengths in one launch, over codes in a pool of pages.

The definition is the reference, row by row, over each sequence's own buffers.
"""

from dataclasses import replace

import mlx.core as mx
import pytest
from helpers import relative_error
from pools import HEADS, LENGTHS, common_buffer, grow, pooled, sequences

import mlx_turboquant as tq
from mlx_turboquant.backends import decode_step
from mlx_turboquant.backends.call import AttendCall, BatchCall
from mlx_turboquant.backends.gpu import MAX_STEP, Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.batch_handles import CompressedBatch
from mlx_turboquant.segments import PreparedSteps

TOLERANCE = 4e-3


def masks_of(kind, batch, heads, steps, lengths):
    """A mask for all rows, right-aligned, and each row's own."""
    longest = max(lengths)
    if kind == "bool":
        mask = mx.random.uniform(shape=(batch, 1, steps, longest)) > 0.3
    elif kind == "additive":
        mask = mx.random.normal((batch, heads, steps, longest))
    else:
        return kind, [kind] * batch
    return mask, [mask[row : row + 1, ..., -n:] for row, n in enumerate(lengths)]


#: spec, dims, group, L, mask, learned sinks, dtype
CASES = {
    "one token": ("k3v3", (64, 64), 2, 1, None, False, mx.float32),
    "llama": ("k3v3", (128, 128), 4, 1, None, False, mx.bfloat16),
    "causal": ("k4v2", (128, 64), 2, 4, "causal", False, mx.float16),
    "verify rows": ("k3v3", (64, 64), 2, 16, "causal", True, mx.float32),
    "tree": ("k4v4", (64, 64), 2, 16, "bool", False, mx.float32),
    "additive": ("k3v4,center=off", (64, 64), 1, 2, "additive", True, mx.float32),
    "not rotated": ("k4v4", (80, 96), 2, 2, "causal", False, mx.float32),
    "no sink": ("k4v4,sink=0,equalize=off", (64, 64), 2, 1, None, False, mx.float32),
    "trellis": ("k3v2.5,codec=trellis", (64, 64), 2, 1, "bool", False, mx.float32),
    "angles": (
        "k3.5v3,codec=research.turboangle",
        (64, 64),
        1,
        1,
        None,
        False,
        mx.float32,
    ),
    "wide": ("k8v8", (256, 256), 1, 1, None, False, mx.float32),
}


def prepared(case, lengths=LENGTHS):
    spec, dims, group, steps, kind, learned, dtype = CASES[case]
    rows = sequences(f"{spec},page=64,window=17", dims, dtype, lengths)
    # As of a window that was left, one sink is shorter than others.
    rows[-2] = [with_less_sink(side) for side in rows[-2]]
    heads, batch = HEADS * group, len(rows)
    q = mx.random.normal((batch, heads, steps, dims[0])).astype(dtype)
    shown = [k.shape[2] for k, _ in rows]
    mask, own = masks_of(kind, batch, heads, steps, shown)
    sinks = mx.random.normal((heads,)) if learned else None
    return rows, q, dims[0] ** -0.5, mask, own, sinks


def with_less_sink(side):
    if side.sink is None:
        return side
    return replace(side, sink=mx.contiguous(side.sink[:, :, 2:]))


def alone(rows, q, scale, masks, sinks):
    """The reference, row by row."""
    outputs = []
    for row, ((keys, values), mask) in enumerate(zip(rows, masks, strict=True)):
        sides = [replace(side, backend=Reference()) for side in (keys, values)]
        own = q[row : row + 1].astype(mx.float32)
        outputs.append(tq.attend(own, *sides, scale, mask, sinks))
    return mx.concatenate(outputs)


def attended(backend, rows, q, scale, mask, sinks, **window):
    sides = [replace(side, backend=backend, **window) for side in pooled(rows)]
    out = tq.attend(q, *sides, scale, mask, sinks)
    assert len(sides[0].prepared) == 1
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_batch_agrees_with_the_reference_row_by_row(case, launcher):
    rows, q, scale, mask, masks, sinks = prepared(case)
    got = attended(Gpu(launcher, 24), rows, q, scale, mask, sinks)
    assert got.dtype == q.dtype
    want = alone(rows, q, scale, masks, sinks)
    floor = 0.004 if q.dtype == mx.bfloat16 else 0
    for row in range(len(rows)):
        error = relative_error(
            got[row].astype(mx.float32), want[row].astype(mx.float32)
        )
        assert error < TOLERANCE + floor, row


@pytest.mark.parametrize("case", ["one token", "additive"])
def test_batches_in_every_mode(case, launcher, mode):
    rows, q, scale, mask, masks, sinks = prepared(case, (130, 23, 270))
    got = attended(Gpu(launcher, 12), rows, q, scale, mask, sinks)
    assert relative_error(got, alone(rows, q, scale, masks, sinks)) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["one token", "llama", "verify rows", "tree", "trellis"]
)
def test_a_row_is_its_single_launch_bit_for_bit(case, launcher, monkeypatch):
    """In splits of the same size; codes and recent tokens lie elsewhere."""
    monkeypatch.setattr(decode_step, "tokens_per_split", lambda *sizes: 128)
    rows, q, scale, mask, masks, sinks = prepared(case)
    backend, batch = Gpu(launcher), pooled(rows)
    got = backend.attend_batch(BatchCall(q, *batch, scale, mask, sinks))
    for row, (sides, own) in enumerate(zip(rows, masks, strict=True)):
        if row == 0:  # without codes it is MLX's own attention
            continue
        first = batch[0].firsts[row]
        sides = [
            replace(
                side,
                recent=mx.contiguous(joined.recent[row : row + 1, :, first:]),
                prepared=PreparedSteps(),
            )
            for side, joined in zip(sides, batch, strict=True)
        ]
        call = AttendCall(q[row : row + 1], *sides, scale, own, sinks)
        assert mx.array_equal(got[row : row + 1], backend.attend(call)).item(), row


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", [0, 3])
def test_windows_hide_what_is_behind_them(steps, masked, keep, launcher, mode):
    """Of some rows: part of the sink, or all of it and part of the codes."""
    most, lengths = 319, (97, 321, 400)
    rows = sequences("k3v3,page=64,window=17", (64, 64), lengths=lengths)
    hidden = [
        [replace(side, hidden=(keep, max(0, length - most))) for side in sides]
        for sides, length in zip(rows, lengths, strict=True)
    ]
    q = mx.random.normal((3, 4, steps, 64))
    kind = "bool" if masked else "causal" if steps > 1 else None
    mask, own = masks_of(kind, 3, 4, steps, [min(n, most) for n in lengths])
    window = {"keep": keep, "most_shown": most}
    got = attended(Gpu(launcher, 12), hidden, q, 0.125, mask, None, **window)
    assert relative_error(got, alone(hidden, q, 0.125, own, None)) < TOLERANCE


def test_a_prepared_step_serves_while_recent_tokens_and_the_pool_grow(launcher):
    rows = sequences("k4v3,page=64,window=17", (64, 64), lengths=(197, 321))
    backend, batch = Gpu(launcher, 12), pooled(rows)
    for step in range(4):
        q, k, v = (mx.random.normal((2, h, 1, 64)) for h in (4, HEADS, HEADS))
        mask, masks = masks_of(
            "bool" if step % 2 else None, 2, 4, 1, [198 + step, 322 + step]
        )
        for index, (side, new) in enumerate(zip(batch, (k, v), strict=True)):
            side.recent[:, :, side.stop : side.stop + 1] = new
            side.stop += 1
            for row, sides in enumerate(rows):
                tokens = [sides[index].recent_tokens, new[row : row + 1]]
                recent = mx.concatenate(tokens, axis=2)
                length = recent.shape[2]
                sides[index] = replace(
                    sides[index], recent=recent, recent_length=length
                )
        if step == 2:  # elsewhere from now on
            for side in batch:
                grow(side.rows)
        got = backend.attend_batch(BatchCall(q, *batch, 0.125, mask))
        assert relative_error(got, alone(rows, q, 0.125, masks, None)) < TOLERANCE
    assert len(batch[0].prepared) == 2  # one for each kind of mask


@pytest.mark.parametrize("backend", ["gpu", "reference"])
def test_what_is_not_taken_at_once_is_taken_row_by_row(backend, launcher):
    """A prompt's chunk, whose codes are decoded where they lie; or without kernels."""
    steps = MAX_STEP + 1 if backend == "gpu" else 2
    backend = Gpu(launcher) if backend == "gpu" else Reference()
    center = "" if isinstance(backend, Gpu) else ",center=off"
    spec = f"k3v3,page=64,window=17{center}"
    rows, sides = sequences(spec, (64, 64)), []
    for side in pooled(rows):
        own = [replace(row, backend=backend) for row in side.rows]
        sides.append(replace(side, rows=own, backend=backend))
    q = mx.random.normal((len(rows), 4, steps, 64))
    mask, masks = masks_of("additive", len(rows), 4, steps, LENGTHS)
    for asked, own in ((mask, masks), ("causal", ["causal"] * len(rows))):
        got = tq.attend(q, *sides, 0.125, asked)
        assert relative_error(got, alone(rows, q, 0.125, own, None)) < TOLERANCE


def test_a_batch_says_what_it_is_and_what_it_cannot_be(launcher):
    rows = sequences("k3v3,page=64,window=17", (64, 64), lengths=(97, 321))
    keys, values = (replace(s, backend=Gpu(launcher)) for s in pooled(rows))
    assert (keys.shape, keys.dtype, keys.ndim) == ((2, HEADS, 321, 64), mx.float32, 4)
    assert "CompressedBatch(CompressedTokens(" in repr(keys)
    assert keys.observer is None
    q = mx.random.normal((2, 4, 1, 64))
    with pytest.raises(ValueError, match=r"queries \(1, 4, 1, 64\) do not fit keys"):
        tq.attend(q[:1], keys, values, 0.125)
    with pytest.raises(ValueError, match="mask 'full' is unknown"):
        tq.attend(q, keys, values, 0.125, "full")
    other = sequences("k4v3,page=64,window=17", (64, 64), lengths=(97,))[0]
    mixed = replace(keys, rows=[keys.rows[0], other[0]])
    with pytest.raises(ValueError, match="rows of turboquant:3, turboquant:4 cannot"):
        tq.attend(q, mixed, values, 0.125)


def test_a_batch_of_rows_without_codes(launcher):
    rows = sequences("k3v3,page=64,window=17", (64, 64), lengths=(23, 40))
    recents = [common_buffer(sides) for sides in zip(*rows, strict=True)]
    sides = [
        CompressedBatch(
            [row[i] for row in rows], *recents[i], Gpu(launcher), PreparedSteps()
        )
        for i in range(2)
    ]
    q = mx.random.normal((2, 4, 1, 64))
    want = alone(rows, q, 0.125, [None, None], None)
    assert relative_error(tq.attend(q, *sides, 0.125), want) < TOLERANCE
