"""Decode attention: the real Metal sources against the reference backend.

A kernel decodes levels by polynomials and multiplies in half2, so it differs from the
definition by a few 1e-3, far below what quantization itself costs (0.18 at 3 bits).
"""

import copy
import math
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers import in_tile_order, relative_error, softmax_attention

import mlx_turboquant as tq
from mlx_turboquant.backends import select
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.errors import BackendUnavailableError
from mlx_turboquant.kernels.tuning import Tuning
from mlx_turboquant.tiles import in_vectors
from mlx_turboquant.tokens import TokenArrays

TOLERANCE = 4e-3


def filled(spec, length, heads, k_dim, v_dim, dtype=mx.float32, batch=1):
    """Handles after a prefill and a short step; channels differ in size and mean."""

    def made(dim, offset):
        gains = mx.exp(mx.random.normal((batch, heads, 1, dim)))
        x = mx.random.normal((batch, heads, length, dim)) * gains
        return (x + offset * mx.random.normal((batch, heads, 1, dim))).astype(dtype)

    k, v = made(k_dim, 2), made(v_dim, 0)
    cache = tq.TurboQuantCache(spec)
    cache.update_and_fetch(k[:, :, :-3], v[:, :, :-3])
    sides = cache.update_and_fetch(k[:, :, -3:], v[:, :, -3:])
    return [in_tile_order(side) for side in sides]


def mask_of(kind, heads, steps, length):
    if kind == "bool":
        return mx.random.uniform(shape=(steps, length)) > 0.3
    if kind == "additive":
        return mx.random.normal((1, heads, steps, length))
    return kind


@pytest.fixture(params=[0, 4], ids=["matrices", "multiply-adds"])
def tuning(request):
    """How few query rows are multiplied, whatever this launcher does unasked."""
    return Tuning(fma_rows=request.param)


#: spec, dims, KV heads, group, L, tokens, mask, learned sinks
CASES = {
    "llama": ("k3v3", (128, 128), 2, 4, 1, 300, None, False),
    "mha": ("k4v3", (64, 64), 2, 1, 1, 333, None, False),
    "one bit": ("k1v1", (64, 32), 1, 2, 1, 200, None, False),
    "two bits": ("k2v2", (64, 32), 1, 2, 1, 200, None, False),
    "five bits": ("k5v4", (64, 32), 1, 2, 1, 200, None, False),
    "tables": ("k6v7", (64, 32), 1, 2, 1, 200, None, False),
    "eight bits": ("k8v8", (64, 64), 1, 2, 1, 200, None, False),
    "dims 80 and 96": ("k3v2", (80, 96), 2, 3, 1, 300, None, False),
    "dim 72": ("k3v3", (72, 72), 1, 2, 3, 300, "bool", False),
    "dims 192 and 128": ("k3v4", (192, 128), 1, 2, 2, 300, "causal", False),
    "dim 256": ("k5v5", (256, 256), 1, 1, 1, 300, None, False),
    "dim 512": ("k3v3", (512, 512), 1, 2, 1, 200, None, False),
    "eight rows": ("k3v3", (128, 128), 2, 2, 8, 300, "causal", False),
    "mask and sinks": ("k3v3", (128, 64), 2, 2, 4, 300, "additive", True),
    "trellis": ("k3v3,codec=trellis", (128, 128), 2, 4, 1, 300, None, False),
    "two trellises": ("k4v3.5,codec=trellis", (64, 96), 1, 2, 2, 300, "causal", False),
    "low rates": ("k1v1.5,codec=trellis", (64, 64), 1, 2, 1, 300, None, False),
    "more low rates": ("k2v2.5,codec=trellis", (80, 64), 1, 2, 1, 300, None, False),
    "pairs": (
        "k3v3,codec=research.turboangle-fixed",
        (128, 64),
        1,
        2,
        1,
        300,
        None,
        False,
    ),
    "two kinds": (
        "k3.5v4,codec=research.turboangle-fixed/trellis",
        (72, 64),
        1,
        2,
        1,
        300,
        None,
        False,
    ),
    "angles": (
        "k3.5v3,codec=research.turboangle",
        (128, 128),
        1,
        4,
        1,
        300,
        None,
        False,
    ),
    "more angles": (
        "k4v2.5,codec=research.turboangle",
        (72, 80),
        2,
        2,
        2,
        200,
        "causal",
        False,
    ),
    "mixed": (
        "k3.5v3,codec=research.turboangle/trellis",
        (64, 64),
        1,
        2,
        1,
        200,
        None,
        False,
    ),
    "int4": ("k4v4,codec=rotated-int4", (64, 64), 1, 2, 1, 300, None, False),
    "three rows": ("k2v3", (64, 128), 2, 1, 3, 300, "bool", True),
    "four rows": ("k4v2", (128, 64), 1, 2, 2, 300, "additive", True),
    "dim 256, three rows": ("k2v4", (256, 256), 1, 3, 1, 200, "bool", False),
    "dim 256, four rows": ("k3v3", (64, 256), 1, 4, 1, 200, None, False),
    "dim 512, one row": ("k3v3", (72, 512), 1, 1, 1, 200, None, False),
    "nothing centred": ("k4v4,sink=0,center=off", (64, 64), 2, 2, 1, 300, None, True),
    "one token packed": (
        "k4v4,page=32,window=0,sink=4",
        (64, 64),
        1,
        2,
        1,
        39,
        None,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, tuning, launcher, mode):
    spec, dims, heads, group, steps, length, kind, learned = CASES[case]
    rows = group * steps
    if rows > 4 and tuning.fma_rows:
        pytest.skip("matrix products only")
    if rows <= 4 and not tuning.fma_rows and mode != "plain":
        pytest.skip("code that more rows have in this mode")
    keys, values = filled(spec, length, heads, *dims)
    q = mx.random.normal((1, heads * group, steps, dims[0]))
    mask = mask_of(kind, heads * group, steps, length)
    sinks = mx.random.normal((heads * group,)) if learned else None
    backend = Gpu(launcher, 6, tuning)
    assert backend.refuse(keys.quantizer, values.quantizer) is None
    call = AttendCall(q, keys, values, dims[0] ** -0.5, mask, sinks)
    assert relative_error(backend.attend(call), Reference().attend(call)) < TOLERANCE


@pytest.mark.parametrize("head_dim", [64, 80])  # rotated by kernels, by operations
def test_values_of_another_dtype_than_keys(launcher, head_dim):
    """As of models whose rotary embedding works in float32."""
    keys, values = filled("k4v4,sink=4", 200, 2, head_dim, head_dim)
    tokens = {n: getattr(values, n).astype(mx.float16) for n in ("sink", "recent")}
    call = AttendCall(
        mx.random.normal((1, 4, 1, head_dim)), keys, values, head_dim**-0.5
    )
    want = Reference().attend(call)
    other = call._replace(values=replace(values, **tokens))
    got = Gpu(launcher, simdgroups=6).attend(other)
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_models_and_batches(launcher, dtype):
    keys, values = filled("k4v4", 300, 2, 64, 64, dtype, batch=2)
    q = mx.random.normal((2, 4, 2, 64)).astype(dtype)
    call = AttendCall(q, keys, values, 0.125, "causal")
    got = Gpu(launcher).attend(call)
    assert got.dtype == dtype
    wide = Reference().attend(call._replace(q=q.astype(mx.float32)))
    floor = 0.004 if dtype == mx.bfloat16 else 0
    assert relative_error(got.astype(mx.float32), wide) < TOLERANCE + floor


@pytest.mark.parametrize("simdgroups", [1, 2, 5, 64])
def test_the_number_of_splits_changes_nothing(simdgroups, tuning, launcher):
    keys, values = filled("k4v4", 500, 1, 64, 64)
    q = mx.random.normal((1, 2, 1, 64))
    keys.prepared.clear()
    call = AttendCall(q, keys, values, 0.125)
    one = Gpu(launcher, 6, tuning).attend(call)
    keys.prepared.clear()
    other = Gpu(launcher, simdgroups, tuning).attend(call)
    assert relative_error(other, one) < 2e-3


def test_error_falls_with_every_bit(launcher):
    errors = []
    for bits in range(1, 7):
        mx.random.seed(5)
        k, v = (mx.random.normal((1, 1, 300, 64)) for _ in range(2))
        cache = tq.TurboQuantCache(f"k{bits}v{bits}")
        cache.update_and_fetch(k[:, :, :290], v[:, :, :290])
        sides = cache.update_and_fetch(k[:, :, 290:], v[:, :, 290:])
        keys, values = (in_tile_order(side) for side in sides)
        q = mx.random.normal((1, 2, 1, 64))
        got = Gpu(launcher).attend(AttendCall(q, keys, values, 0.2))
        errors.append(relative_error(got, softmax_attention(q, k, v, 0.2)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_one_prepared_step_serves_until_the_next_page(launcher):
    """Recent tokens come and go; each step still agrees with the reference."""
    mx.random.seed(3)
    k, v = (mx.random.normal((1, 2, 420, 64)) for _ in range(2))
    cache, backend = tq.TurboQuantCache("k4v4"), Gpu(launcher, simdgroups=6)
    cache.update_and_fetch(k[:, :, :300], v[:, :, :300])
    prepared = set()
    for at in (300, 301, 302, 419):
        if at == 302:
            cache.trim(2)
            at = 300
        part = slice(at, at + 1)
        sides = cache.update_and_fetch(k[:, :, part], v[:, :, part])
        if at == 419:  # the next page is due
            part = slice(301, 420)
            cache.update_and_fetch(k[:, :, part], v[:, :, part])
            sides = cache.compressed()
        keys, values = (in_tile_order(side) for side in sides)
        q = mx.random.normal((1, 4, 1, 64))
        call = AttendCall(q, keys, values, 0.125)
        got, want = backend.attend(call), Reference().attend(call)
        assert relative_error(got, want) < TOLERANCE
        assert len(keys.prepared) == 1
        prepared.add(id(keys.prepared))
    assert len(prepared) == 2


@pytest.mark.parametrize("spec", ["k3v4", "k3v2.5,codec=trellis"])
def test_tiles_behind_the_last_token_are_not_read(spec, tuning, launcher, mode):
    """Buffers have room: here of words all ones, and of scales that are no numbers."""
    keys, values = filled(f"{spec},page=32,window=9", 120, 2, 64, 64)
    q = mx.random.normal((1, 4, 1, 64))
    outputs, backend = [], Gpu(launcher, 6, tuning)
    for fill in (None, math.nan):
        sides = [keys, values]
        if fill is not None:
            sides = [replace(side, packed=with_room(side.packed)) for side in sides]
        keys.prepared.clear()
        outputs.append(backend.attend(AttendCall(q, *sides, 0.125)))
        assert sides[0].packed_length == 96
    assert mx.array_equal(*outputs).item()


def with_room(codes):
    """The same codes in buffers of five more tiles of rubbish."""
    arrays = {}
    for name, array in codes.views().items():
        rubbish = math.nan if name == "scales" else 0xFFFFFFFF
        tail = mx.full((*array.shape[:2], 5, array.shape[3]), rubbish, array.dtype)
        arrays[name] = mx.concatenate([array, tail], axis=2)
    return TokenArrays(arrays, codes.length, layout=codes.layout)


class Noted:
    """A launcher that notes how many rows pass 1 takes by multiply-adds."""

    def __init__(self, name):
        self.name, self.rows = name, None

    def __call__(self, launch, inputs):
        self.rows = dict(launch.template).get("FMA_ROWS", self.rows)
        shapes = zip(launch.output_shapes, launch.output_dtypes, strict=True)
        return [mx.zeros(*shape) for shape in shapes]


@pytest.mark.parametrize(
    ("name", "wanted", "v_dim", "taken"),
    [
        ("metal", None, 256, {1: 1, 3: 3, 4: 4, 5: 0}),
        ("metal", None, 512, {1: 1, 2: 0}),
        ("metal", 0, 64, {1: 0, 4: 0}),
        ("simulator", None, 64, {2: 2}),
        ("cuda", None, 64, {1: 0, 4: 0}),
        ("cuda", 4, 64, {1: 1, 4: 4, 5: 0}),
        ("cuda", 2, 64, {1: 1, 2: 2, 3: 0}),
    ],
)
def test_few_rows_take_multiply_adds_where_these_are_better(name, wanted, v_dim, taken):
    keys, values = filled("k3v3", 200, 1, 64, v_dim)
    for rows in taken:
        launcher = Noted(name)
        call = AttendCall(mx.zeros((1, rows, 1, 64)), keys, values, 0.125)
        Gpu(launcher, 6, Tuning(fma_rows=wanted)).attend(call)
        assert launcher.rows == taken[rows]


def test_codes_in_vector_order_are_refused(launcher):
    keys, values = filled("k3v3", 200, 1, 64, 64)
    sides = [replace(s, packed=in_vectors(s.packed)) for s in (keys, values)]
    call = AttendCall(mx.zeros((1, 1, 1, 64)), *sides, 0.125)
    with pytest.raises(ValueError, match=r"in vector order; see Gpu\.arranged"):
        Gpu(launcher).attend(call)


def test_refusals_are_words(launcher):
    backend = Gpu(launcher)

    def refusal(spec, k_dim):
        sides = filled(spec, 20, 1, k_dim, 64)
        return backend.refuse(*(side.quantizer for side in sides))

    assert "identity:16 has no kernel" in refusal("k16v3", 64)
    assert "head_dim 576 is over 512" in refusal("k3v3", 576)


@pytest.fixture
def asked_again():
    """The environment is read once a process; these tests are many processes' worth."""
    select.requested.cache_clear()
    yield
    select.requested.cache_clear()


def test_choice_of_backend_is_shown_and_can_be_forced(
    launcher, lane, monkeypatch, asked_again
):
    kv = mx.random.normal((1, 2, 300, 64))
    q = mx.random.normal((1, 4, 1, 64))

    def run(spec, gpu, variable=None, default_on=(launcher.name,)):
        """What a new cache's attention says, and which backend it took."""
        monkeypatch.setattr(select, "gpu_backend", lambda: gpu)
        monkeypatch.setattr(select, "DEFAULT_ON", default_on)
        if variable is None:
            monkeypatch.delenv(select.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(select.VARIABLE, variable)
        select.requested.cache_clear()
        cache = tq.TurboQuantCache(spec)
        # Encoded on the CPU whatever attends, so that all attend to the same codes.
        cache.update_and_fetch(kv, kv)
        sides = cache.update_and_fetch(kv[:, :, :1], kv[:, :, :1])
        return tq.attend(q, *sides, 0.125), tq.explain(cache).layers[0].backend

    backend = Gpu(launcher)
    on_cpu, name = run("k4v4", None)
    assert name == "cpu"
    plain, name = run("k4v4", backend, default_on=())
    # A GPU multiplies float32 matrices in fewer bits, and not alike on both ways.
    assert relative_error(on_cpu, plain) < (1e-6 if lane == "simulator" else 1e-3)
    assert name.startswith("reference: ")
    assert "kernels are off" in name
    fused, name = run("k4v4", backend)
    assert name == launcher.name
    assert 0 < relative_error(fused, plain) < TOLERANCE
    forced, name = run("k4v4", backend, "reference")
    assert mx.array_equal(forced, plain).item()
    assert name == "reference: MLX_TQ_BACKEND is set"
    forced, name = run("k4v4", backend, "gpu", default_on=())
    assert mx.array_equal(forced, fused).item()
    _, name = run("k16v4", backend)
    assert name == "reference: codec identity:16 has no kernel"
    with pytest.raises(BackendUnavailableError, match=r"identity.* has no kernel"):
        run("k16v4", backend, "gpu")
    with pytest.raises(BackendUnavailableError, match="runs on the CPU"):
        run("k4v4", None, "gpu")
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        run("k4v4", backend, "cuda")


def test_copies_and_batches_go_on_by_themselves(launcher, monkeypatch):
    """A cache that has decoded by kernels is copied, merged and extracted."""
    monkeypatch.setattr(select, "gpu_backend", lambda: Gpu(launcher, simdgroups=6))
    monkeypatch.setattr(select, "DEFAULT_ON", (launcher.name,))
    k, v = (mx.random.normal((1, 2, 310, 64)) for _ in range(2))
    q = mx.random.normal((1, 4, 310, 64))
    cache = tq.TurboQuantCache("k4v4")

    def step(cache, at, batch=1):
        part = (slice(None), slice(None), slice(at, at + 1))
        new = [mx.repeat(x[part], batch, axis=0) for x in (q, k, v)]
        return tq.attend(new[0], *cache.update_and_fetch(*new[1:]), 0.125)

    cache.update_and_fetch(k[:, :, :300], v[:, :, :300])
    step(cache, 300)
    twin = copy.deepcopy(cache)
    step(twin, 305)  # another token: the original must not see it
    batch = tq.TurboQuantCache.merge([cache, cache])
    got = step(batch, 301, batch=2)
    want = step(cache, 301)
    assert relative_error(got[1:], want) < 1e-6
    alone = batch.extract(1)
    assert relative_error(step(alone, 302), step(cache, 302)) < 1e-6


@pytest.mark.parametrize("at", [0, 1700, 2990])
@pytest.mark.parametrize("simdgroups", [1, 5])
def test_a_long_tail_counts_beside_one_large_weight(at, simdgroups, tuning, launcher):
    """One token weighs 2^14 times as much as any of 3,000, whose values are one way.

    Halves from 2^-14 down are subnormal, and the simulator's products drop those.
    """
    q = mx.random.normal((1, 1, 1, 64))
    k = 0.02 * mx.random.normal((1, 1, 3200, 64))
    k[:, :, at] += 14 * math.log(2) * q[:, :, 0] / mx.sum(q * q)
    v = 1 + 0.1 * mx.random.normal((1, 1, 3200, 64))
    v[:, :, at] *= 0.1
    keys, values = stored_sides("k8v8,sink=0,window=0,center=off", k, v)
    call = AttendCall(q, keys, values, 1.0)
    got = Gpu(launcher, simdgroups, tuning).attend(call)
    want = Reference().attend(call)
    assert relative_error(got, want) < TOLERANCE


def rising(q, tokens):
    """Keys whose logits rise by 1/16 from token to token, and values."""
    k = 0.1 * mx.random.normal((1, 1, tokens, 64))
    steps = mx.arange(tokens, dtype=mx.float32)[:, None] / 16
    k = k + steps * q[:, :1, 0, None] / mx.sum(q[:, :1] * q[:, :1])
    return k, mx.random.normal((1, 1, tokens, 64))


@pytest.mark.parametrize("rows", [1, 3])
def test_every_round_may_raise_the_maximum(rows, tuning, launcher, mode):
    q = mx.random.normal((1, rows, 1, 64))
    keys, values = stored_sides("k8v8,sink=0,window=0,center=off", *rising(q, 700))
    call = AttendCall(q, keys, values, 1.0)
    got = Gpu(launcher, 2, tuning).attend(call)
    want = Reference().attend(call)
    assert relative_error(got, want) < 2 * TOLERANCE


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_queries_that_are_no_numbers_spoil_their_own_row_only(number, tuning, launcher):
    q = mx.random.normal((1, 2, 1, 64))
    keys, values = stored_sides("k4v4,center=off", *rising(q, 400))
    spoilt = mx.concatenate([q[:, :1], mx.full((1, 1, 1, 64), number)], axis=1)
    got = Gpu(launcher, None, tuning).attend(AttendCall(spoilt, keys, values, 1.0))
    want = Reference().attend(AttendCall(q, keys, values, 1.0))
    assert relative_error(got[:, :1], want[:, :1]) < 2 * TOLERANCE


@pytest.mark.parametrize("rising", [False, True])
def test_scales_of_values_may_differ_by_six_decades(rising, tuning, launcher):
    q = mx.random.normal((1, 4, 1, 64))
    k, v = (mx.random.normal((1, 1, 1000, 64)) for _ in range(2))
    decades = mx.random.uniform(-3, 3, (1, 1, 1000, 1))
    v *= 10 ** (mx.sort(decades, axis=2) if rising else decades)
    # What weighs most is smallest: small values have to be added up, too.
    small = mx.max(mx.abs(v), axis=-1, keepdims=True) < 0.01
    k = mx.where(small, k + mx.mean(q, axis=1, keepdims=True), k)
    keys, values = stored_sides("k4v4", k, v)
    call = AttendCall(q, keys, values, 1.0)
    got = Gpu(launcher, 3, tuning).attend(call)
    want = Reference().attend(call)
    assert relative_error(got, want) < TOLERANCE


def stored_sides(spec, k, v):
    """Handles after a prefill of all but the last token."""
    cache = tq.TurboQuantCache(spec)
    cache.update_and_fetch(k[:, :, :-1], v[:, :, :-1])
    sides = cache.update_and_fetch(k[:, :, -1:], v[:, :, -1:])
    return [in_tile_order(side) for side in sides]
