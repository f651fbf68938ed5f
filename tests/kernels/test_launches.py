"""What the kernels make of buffers and arguments, launched without a backend."""

import math

import metalsim
import mlx.core as mx
import pytest
from helpers import relative_error

from mlx_turboquant.kernels.arguments import pack, struct_text
from mlx_turboquant.kernels.attention import MERGE_STATES, AttendArguments
from mlx_turboquant.kernels.codes import DecodeArguments, EncodeArguments
from mlx_turboquant.kernels.kernel import Launch

HEADS, GROUP, STEPS, DIM = 2, 2, 3, 64
SINK, RECENT, SPLITS = 4, 21, 3


@pytest.mark.parametrize("cls", [AttendArguments, EncodeArguments, DecodeArguments])
def test_a_loader_puts_each_argument_into_its_field(cls, lane):
    if lane != "simulator":
        pytest.skip("the text is the same everywhere")
    reads = [f"out[{i}] = args.{field};" for i, field in enumerate(cls._fields)]
    body = f"{cls.__name__} args = load_arguments(arguments);\n" + "\n".join(reads)
    kernel = metalsim.metal_kernel(
        name="reads_arguments",
        input_names=["arguments"],
        output_names=["out"],
        source=body,
        header="#define TQ_FUNC inline\n" + struct_text(cls),
    )
    values = {field: 7 * i - 3 for i, field in enumerate(cls._fields)}
    (out,) = kernel(
        inputs=[pack(cls(**values))],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(len(cls._fields),)],
        output_dtypes=[mx.int32],
    )
    assert dict(zip(cls._fields, out.tolist(), strict=True)) == values


def merge(launcher, capacity, poison):
    """One merge of buffers of ``capacity`` tokens, poisoned behind the last in use."""
    rows = HEADS * GROUP * STEPS
    q = mx.random.normal((1, HEADS * GROUP, STEPS, DIM))
    partial_out = mx.random.normal((rows * SPLITS, DIM))
    lse = [
        mx.random.normal((rows * SPLITS,)),
        mx.random.uniform(1, 9, (rows * SPLITS,)),
    ]
    sink = [mx.random.normal((1, HEADS, SINK, DIM)) for _ in range(2)]
    recent = [mx.random.normal((1, HEADS, RECENT, DIM)) for _ in range(2)]
    tail = mx.full((1, HEADS, capacity - RECENT, DIM), poison)
    args = AttendArguments(
        packed=96,
        splits=SPLITS,
        tokens_per_split=32,
        kv_heads=HEADS,
        rows=GROUP * STEPS,
        steps=STEPS,
        sink=SINK,
        recent=RECENT,
        causal=1,
        mask_columns=8,
        page=1,
    )
    template = {"T": mx.float32, "DK": DIM, "DV": DIM, "MASKED": False}
    template |= {"SIMDGROUPS": 2, "ROTATE_V": False, "HAS_SINK_LOGITS": False}
    launch = Launch(
        MERGE_STATES,
        list(template.items()),
        grid=(64, rows, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(1, HEADS * GROUP, STEPS, DIM)],
        output_dtypes=[mx.float32],
    )
    unused = mx.zeros(8)
    inputs = [
        q,
        partial_out,
        mx.stack(lse, axis=-1),
        *sink,
        *[mx.concatenate([side, tail], axis=2) for side in recent],
        *[unused, unused, unused],
        mx.ones(8),
        pack(args),
    ]
    (out,) = launcher(launch, inputs)
    return out, (q, partial_out, lse, sink, recent)


def expected(q, partial_out, lse, sink, recent):
    """The same in mx: softmax over the splits' states and the tokens at hand."""
    keys, values = (mx.concatenate(s, axis=2) for s in zip(sink, recent, strict=True))
    keys, values = (mx.repeat(x, GROUP, axis=1) for x in (keys, values))
    logits = q @ keys.swapaxes(-1, -2)
    token = mx.arange(SINK + RECENT)
    hidden = token > SINK + RECENT - STEPS + mx.arange(STEPS)[:, None]
    logits = mx.where(hidden, -math.inf, logits)
    maximum, denominator = (x.reshape(1, HEADS * GROUP, STEPS, SPLITS) for x in lse)
    top = mx.maximum(maximum.max(-1, keepdims=True), logits.max(-1, keepdims=True))
    weights, shares = mx.power(2.0, logits - top), mx.power(2.0, maximum - top)
    split_sums = partial_out.reshape(1, HEADS * GROUP, STEPS, SPLITS, DIM)
    total = weights @ values + mx.sum(shares[..., None] * split_sums, axis=-2)
    share = mx.sum(shares * denominator, axis=-1, keepdims=True)
    return total / (mx.sum(weights, axis=-1, keepdims=True) + share)


@pytest.mark.parametrize("capacity", [RECENT + 1, 64])
def test_the_merge_reads_recent_buffers_up_to_their_tokens_in_use(
    capacity, launcher, mode
):
    out, inputs = merge(launcher, capacity, math.nan)
    assert relative_error(out, expected(*inputs)) < 1e-5
