"""What the kernels make of buffers and arguments, launched without a backend."""

import math

import metalsim
import mlx.core as mx
import pytest
from helpers import relative_error

from mlx_turboquant.kernels.arguments import pack, struct_text
from mlx_turboquant.kernels.attention import (
    DECODE_SPLIT_KV,
    MERGE_STATES,
    AttendArguments,
)
from mlx_turboquant.kernels.codes import (
    EncodeArguments,
    GainsArguments,
    MaterializeArguments,
    OrderArguments,
    PageMeansArguments,
    RotateArguments,
)
from mlx_turboquant.kernels.kernel import Launch
from mlx_turboquant.kernels.probe import ProbeArguments

HEADS, GROUP, STEPS, DIM = 2, 2, 3, 64
SINK, RECENT, SPLITS = 4, 21, 3


@pytest.mark.parametrize(
    "cls",
    [
        AttendArguments,
        EncodeArguments,
        OrderArguments,
        MaterializeArguments,
        RotateArguments,
        PageMeansArguments,
        GainsArguments,
        ProbeArguments,
    ],
)
def test_a_loader_puts_each_argument_into_its_field(cls, lane):
    if lane != "simulator":
        pytest.skip("the text is the same everywhere")
    reads = [f"out[{i}] = args.{field};" for i, field in enumerate(cls._fields)]
    body = f"{cls.__name__} args = load_arguments(arguments, 1u);\n" + "\n".join(reads)
    kernel = metalsim.metal_kernel(
        name="reads_arguments",
        input_names=["arguments"],
        output_names=["out"],
        source=body,
        header="#define TQ_FUNC inline\n" + struct_text(cls),
    )
    values = {field: 7 * i - 3 for i, field in enumerate(cls._fields)}
    other = cls(*[99] * len(cls._fields))
    (out,) = kernel(
        inputs=[pack(other, cls(**values))],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(len(cls._fields),)],
        output_dtypes=[mx.int32],
    )
    assert dict(zip(cls._fields, out.tolist(), strict=True)) == values


ARGUMENTS = AttendArguments(
    packed=96,
    splits=SPLITS,
    tokens_per_split=32,
    plain_splits=1,
    kv_heads=HEADS,
    rows=GROUP * STEPS,
    steps=STEPS,
    sink=SINK,
    recent=RECENT,
    first_recent=0,
    causal=1,
    longest=0,
    keep=0,
    most_shown=1 << 30,
    page=1,
    pool_row=0,
    table=0,
    first_partial=0,
)


def merge(launcher, partial_out, lse, arguments):
    """One merge of partial results (rows, splits, DIM) and states (rows, splits, 2)."""
    template = {"T": mx.float32, "DV": DIM, "SIMDGROUPS": 2, "ROTATE_V": False}
    template |= {"HAS_SINK_LOGITS": False}
    launch = Launch(
        MERGE_STATES,
        list(template.items()),
        grid=(64, partial_out.shape[0], 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(1, HEADS * GROUP, STEPS, DIM)],
        output_dtypes=[mx.float32],
    )
    unused = mx.zeros(8)
    (out,) = launcher(launch, [partial_out, lse, unused, unused, pack(arguments)])
    return out


@pytest.mark.parametrize("splits", [1, 7, 40])
def test_a_merge_weighs_splits_by_their_states(splits, launcher, mode):
    rows = HEADS * GROUP * STEPS
    partial_out = mx.random.normal((rows, splits + 1, DIM))
    maximum = 3 * mx.random.normal((rows, splits + 1))
    maximum[:, 0] = -1e30  # nothing to see there
    denominator = mx.random.uniform(1, 9, (rows, splits + 1))
    arguments = ARGUMENTS._replace(splits=splits)
    lse = mx.stack([maximum, denominator], axis=-1)
    out = merge(launcher, partial_out, lse, arguments)
    shares = mx.power(2.0, maximum - maximum.max(-1, keepdims=True))[..., None]
    total = mx.sum(shares * partial_out, axis=1)
    want = total / mx.sum(shares * denominator[..., None], axis=1)
    assert relative_error(out.reshape(want.shape), want) < 1e-5


def test_rows_that_see_nothing_come_out_as_zeros(launcher, mode):
    rows = HEADS * GROUP * STEPS
    nothing = mx.zeros((rows, SPLITS + 1))
    lse = mx.stack([nothing - 1e30, nothing], axis=-1)
    out = merge(launcher, mx.zeros((rows, SPLITS + 1, DIM)), lse, ARGUMENTS)
    assert mx.array_equal(out, mx.zeros_like(out)).item()


def attend_plain(launcher, capacity, poison):
    """Sink tokens and recent buffers of ``capacity``, poisoned behind those in use."""
    rows = HEADS * GROUP * STEPS
    q = mx.random.normal((1, HEADS * GROUP, STEPS, DIM))
    sink = [mx.random.normal((1, HEADS, SINK, DIM)) for _ in range(2)]
    recent = [mx.random.normal((1, HEADS, RECENT, DIM)) for _ in range(2)]
    tail = mx.full((1, HEADS, capacity - RECENT, DIM), poison)
    dims = {"T": mx.float32, "DK": DIM, "DV": DIM, "MASKED": False, "ROTATE_K": False}
    tables = {"CENTER": False, "FMA_ROWS": 0, "ROW_TILES": 1, "ROW_GROUPS": 1}
    tables |= {"SHARED_TABLE": False, "SIMDGROUPS": 2}
    formats = {"K_KIND": 0, "K_BITS": 3, "K_TERMS": 2}
    formats |= {"V_KIND": 0, "V_BITS": 3, "V_TERMS": 2}
    template = dims | tables | formats
    plain_splits = -(-(SINK + capacity) // 64)
    launch = Launch(
        DECODE_SPLIT_KV,
        list(template.items()),
        grid=(64 * plain_splits, HEADS, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(rows, plain_splits, DIM), (rows, plain_splits, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    unused, scale = mx.zeros((1, HEADS, 8, 1)), mx.ones(8)
    words, scales = unused.astype(mx.uint32), unused.astype(mx.float16)
    arguments = ARGUMENTS._replace(packed=0, splits=0, plain_splits=plain_splits)
    buffers = [mx.concatenate([side, tail], axis=2) for side in recent]
    codes = [words, scales, words, scales]
    tiles = mx.zeros(8, mx.int32)
    constants = [unused, tiles, scales, scale, scale, unused, scale, pack(arguments)]
    partials = launcher(launch, [q, *codes, *sink, *buffers, *constants])
    return merge(launcher, *partials, arguments), (q, sink, recent)


def expected(q, sink, recent):
    """The same in mx, where queries and keys are halves as in the kernel."""
    keys, values = (mx.concatenate(s, axis=2) for s in zip(sink, recent, strict=True))
    q, keys, values = (
        x.astype(mx.float16).astype(mx.float32) for x in (q, keys, values)
    )
    keys, values = (mx.repeat(x, GROUP, axis=1) for x in (keys, values))
    logits = (q @ keys.swapaxes(-1, -2)) * math.log(2)
    token = mx.arange(SINK + RECENT)
    hidden = token > SINK + RECENT - STEPS + mx.arange(STEPS)[:, None]
    return mx.softmax(mx.where(hidden, -math.inf, logits), axis=-1) @ values


@pytest.mark.parametrize("capacity", [RECENT + 1, 64])
def test_recent_buffers_are_read_up_to_their_tokens_in_use(capacity, launcher, mode):
    out, inputs = attend_plain(launcher, capacity, math.nan)
    # Weights are halves, too.
    assert relative_error(out, expected(*inputs)) < 5e-4
