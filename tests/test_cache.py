import copy

import mlx.core as mx
import pytest
from cases import each_spec
from helpers import attend, stored
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import mlx_turboquant as tq
from mlx_turboquant.errors import FormatError, UnsupportedError
from mlx_turboquant.evals.caches import stored_bits
from mlx_turboquant.segments import CompressedTokens
from mlx_turboquant.tokens import TokenArrays

B, H, DK, DV = 1, 2, 64, 32


def tokens(count, dim=DK, seed=0, dtype=mx.float32, batch=B):
    key = mx.random.key(seed)
    return (mx.random.normal((batch, H, count, dim), key=key) + 0.5).astype(dtype)


def feed(cache, keys, values, steps):
    """Append all tokens, and attend, in steps of these sizes, repeated as needed."""
    done, turn = 0, 0
    while done < keys.shape[2]:
        n = steps[turn % len(steps)]
        part = slice(done, done + n)
        sides = cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        # Queries that are a function of the tokens, however they are cut.
        q = mx.repeat(keys[:, :, part] ** 3, 2, axis=1)
        mx.eval(attend(q, *sides, 0.1), cache.state)
        done, turn = done + n, turn + 1
    return cache


def settle(cache):
    """Add one token, so that packing that is due has happened."""
    cache.update_and_fetch(tokens(1), tokens(1, DV))
    cache.trim(1)
    return cache


def same_state(one, other):
    left, right = one.state, other.state
    assert left.keys() == right.keys()
    for name, array in left.items():
        if name == "header":
            assert array == right[name]
        else:
            assert array.dtype == right[name].dtype, name
            assert mx.array_equal(array, right[name]).item(), name


@each_spec
@pytest.mark.parametrize("steps", [[1], [8], [3, 1], [64], [200, 1], [300]])
def test_codes_do_not_depend_on_how_tokens_came(spec, steps):
    """Prefill n + decode 1 == prefill n + 1, bit for bit, for any cut.

    Of a short text, where prompts go on to the last tile, once a prompt follows.
    """
    keys, values = tokens(340), tokens(340, DV, seed=1)
    whole = feed(tq.TurboQuantCache(spec), keys, values, [340])
    cut = feed(tq.TurboQuantCache(spec), keys[:, :, :300], values[:, :, :300], steps)
    feed(cut, keys[:, :, 300:], values[:, :, 300:], [40])
    assert cut.offset == whole.offset == 340
    same_state(settle(cut), settle(whole))


@pytest.mark.parametrize("spec", ["3", "3,page=96", "k4v2,sink=0,window=0"])
@pytest.mark.parametrize("steps", [[1], [300, 1], [700], [2600]])
def test_codes_do_not_depend_on_where_a_short_text_ends(spec, steps):
    """Nor the means: those of the first pages are of one tile, of the others not."""
    keys, values = tokens(2600), tokens(2600, DV, seed=1)
    keys = keys + mx.arange(2600)[:, None] / 500  # means that move within a page
    whole = feed(tq.TurboQuantCache(spec), keys, values, [2600])
    cut = feed(tq.TurboQuantCache(spec), keys, values, steps)
    same_state(settle(cut), settle(whole))
    page, sink = whole.spec.page, whole.spec.sink
    short = 1024 // page * page
    q = whole._quantizers.sides.keys
    for start, sample in ((short - page, 32), (short, page)):
        held = q.means.of_pages(start // page, start // page + 1)
        rows = keys[:, :, sink + start : sink + start + sample]
        want = q.transform.encode(mx.mean(rows, axis=2, keepdims=True))
        assert mx.abs(held - want).max() < 1e-3 * mx.abs(want).max()


@each_spec
def test_segments_hold_what_the_spec_says(spec):
    cache = feed(tq.TurboQuantCache(spec), tokens(500), tokens(500, DV), [120, 1])
    s = cache.spec
    settle(cache)
    assert cache.sink_length == s.sink
    assert cache.packed_length % 32 == 0
    assert s.window <= cache.recent_length < s.window + s.page
    assert cache.sink_length + cache.packed_length + cache.recent_length == 500
    feed(cache, tokens(40), tokens(40, DV), [40])
    assert s.window <= cache.recent_length < s.window + 32  # behind a prompt
    feed(cache, tokens(2500), tokens(2500, DV), [2500])
    assert cache.packed_length % s.page == 0
    assert s.window <= cache.recent_length < s.window + s.page


def test_a_prompt_of_1000_tokens_has_few_that_are_not_compressed():
    """Its buffers too: they end where the next page will be full."""
    keys, values = tokens(1000, 128), tokens(1000, 128, seed=1)
    layer = feed(tq.TurboQuantCache("3"), keys, values, [1000])
    bits, elements = stored_bits([layer])
    assert bits / elements < 4.0
    assert layer.recent_length == 36 - 4 + (1000 - 36) % 32
    assert layer.keys.shape[2] == 32 + 64 + 16


def test_a_rejected_draft_never_touches_the_codes():
    keys, values = tokens(400), tokens(400, DV)
    plain = feed(
        tq.TurboQuantCache("3"), keys[:, :, :305], values[:, :, :305], [300, 1]
    )
    drafted = feed(tq.TurboQuantCache("3"), keys[:, :, :300], values[:, :, :300], [300])
    for position in range(300, 305):
        junk = tokens(5, seed=position)
        k = mx.concatenate([keys[:, :, position : position + 1], junk], axis=2)
        drafted.update_and_fetch(k, tokens(6, DV, seed=9))
        drafted.trim(6)
        feed(
            drafted,
            keys[:, :, position : position + 1],
            values[:, :, position : position + 1],
            [1],
        )
    same_state(settle(plain), settle(drafted))


@each_spec
@pytest.mark.parametrize("cut", [1, 7, 60, 150, 290, 297, 300])
def test_trim_then_append_again_changes_nothing(spec, cut):
    keys, values = tokens(300), tokens(300, DV, seed=1)
    cache = feed(tq.TurboQuantCache(spec), keys, values, [300])
    assert cache.trim(cut) == cut
    assert cache.offset == 300 - cut
    feed(cache, keys[:, :, 300 - cut :], values[:, :, 300 - cut :], [50])
    once = feed(tq.TurboQuantCache(spec), keys, values, [300])
    same_state(settle(cache), settle(once))


def test_trim_takes_no_more_than_there_is():
    cache = feed(tq.TurboQuantCache("3"), tokens(200), tokens(200, DV), [200])
    assert cache.trim(1000) == 200
    assert cache.empty()
    assert cache.size() == 0
    assert cache.trim(1) == 0


def test_attention_of_a_first_chunk_is_mlxs_own_bit_for_bit():
    keys, values, q = tokens(300), tokens(300, DV), tokens(300, seed=3)
    sides = tq.TurboQuantCache("2").update_and_fetch(keys, values)
    got = attend(q, *sides, 0.1, "causal")
    want = mx.fast.scaled_dot_product_attention(
        q, keys, values, scale=0.1, mask="causal"
    )
    assert mx.array_equal(got, want).item()


def test_handles_tell_the_truth_and_refuse_in_words():
    cache = feed(tq.TurboQuantCache("3"), tokens(200), tokens(200, DV), [200])
    keys, values = cache.update_and_fetch(tokens(5), tokens(5, DV))
    assert isinstance(keys, CompressedTokens)
    assert keys.shape == (B, H, 205, DK)
    assert values.shape == (B, H, 205, DV)
    assert keys.dtype == mx.float32
    assert keys.ndim == 4
    for use in (lambda: keys[0], lambda: keys.swapaxes(1, 2), lambda: keys * 2.0):
        with pytest.raises(UnsupportedError, match="reads the cached keys"):
            use()
    assert not hasattr(keys, "bits")
    assert not hasattr(cache, "bits")


@each_spec
def test_state_round_trips_and_copies_are_independent(spec):
    cache = feed(tq.TurboQuantCache(spec), tokens(300), tokens(300, DV), [300])
    again = tq.TurboQuantCache.from_state(cache.state)
    twin = copy.deepcopy(cache)
    same_state(cache, again)
    same_state(cache, twin)
    before = {k: v for k, v in cache.state.items() if k != "header"}
    feed(twin, tokens(70, seed=5), tokens(70, DV, seed=5), [1])
    feed(again, tokens(70, seed=5), tokens(70, DV, seed=5), [1])
    same_state(twin, again)
    assert cache.offset == 300
    for name, array in before.items():
        assert mx.array_equal(array, cache.state[name]).item()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"header": "someone else 1 x"}, "not a mlx_turboquant"),
        ({"header": None}, "not a mlx_turboquant"),
        ({"header": "mlx_turboquant 99 k3v3"}, "format 99 is not 6"),
        ({"header": "mlx_turboquant 4 k3v3 returns_arrays=0"}, "format 4 is not 6"),
        ({"header": "mlx_turboquant 6 k33v3 returns_arrays=0 tiles=0"}, "damaged"),
        ({"header": "mlx_turboquant 6 k3v3 returns_arrays=x tiles=0"}, "damaged"),
        ({"header": "mlx_turboquant 6 k3v3 tiles=0"}, "not say returns_arrays="),
        ({"header": "mlx_turboquant 6 k3v3 returns_arrays=0"}, "not say tiles="),
        ({"header": "mlx_turboquant 6 k3v3 returns_arrays=0 tiles=2"}, "neither 0 nor"),
        # Words of vectors said to be tiles: a kernel would read past their end.
        ({"header": "mlx_turboquant 6 k3v3 returns_arrays=0 tiles=1"}, "do not fit"),
        ({"packed:keys_scales": None}, "do not fit"),
        ({"recent:values": None}, "do not fit"),
    ],
)
def test_foreign_state_is_refused_in_words(change, says):
    cache = feed(tq.TurboQuantCache("3"), tokens(300), tokens(300, DV), [300])
    state = {**cache.state, **change}
    state = {k: v for k, v in state.items() if v is not None}
    with pytest.raises(FormatError, match=says):
        tq.TurboQuantCache.from_state(state)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_side_kept_as_it_is_keeps_its_dtype(dtype):
    """16 bits an element and not 32, whatever arithmetic goes on around it."""
    k, v = tokens(300).astype(dtype), tokens(300, DV).astype(dtype)
    cache = feed(tq.TurboQuantCache("k16v3"), k, v, [300])
    assert cache.state["packed:keys_vectors"].dtype == dtype
    assert mx.array_equal(cache.state["packed:keys_vectors"], k[:, :, 4:260]).item()


def test_a_batch_of_another_shape_is_refused():
    cache = feed(tq.TurboQuantCache("3"), tokens(20), tokens(20, DV), [20])
    with pytest.raises(UnsupportedError, match="do not continue"):
        cache.update_and_fetch(tokens(1, batch=2), tokens(1, DV, batch=2))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_bytes_at_8k_tokens(dtype):
    """Everything counted: codes, scales, sink, window, mean, spare capacity."""
    cache = tq.TurboQuantCache("3")
    for chunk in range(8):
        kv = tokens(1024, 128, seed=chunk, dtype=dtype)
        cache.update_and_fetch(kv, kv)
        mx.eval(cache.state)
    fp16 = 2 * 2 * H * 8192 * 128
    assert cache.elements * 2 == fp16
    assert cache.nbytes <= (0.22 if dtype.size == 2 else 0.242) * fp16
    held = sum(a.nbytes for k, a in cache.state.items() if k != "header")
    assert held <= cache.nbytes
    assert cache.state["recent:keys"].dtype == dtype


@pytest.mark.parametrize("count", [1, 20, 32, 42, 164, 165, 200, 400, 1200])
@pytest.mark.parametrize("steps", [[1200], [100, 1]])
def test_a_loaded_cache_takes_what_the_kept_one_does(count, steps):
    """Of a short text not a whole page's buffer, as while it is written."""
    count = min(count, 400) if len(steps) > 1 else count
    for cache in (tq.TurboQuantCache(3), tq.RotatingTurboQuantCache(3, max_size=512)):
        feed(cache, tokens(count), tokens(count, DV), steps)
        again = type(cache).from_state(cache.state)
        assert again.nbytes == cache.nbytes
        few = tokens(20, seed=5), tokens(20, DV, seed=5)
        assert feed(again, *few, [1]).nbytes == feed(cache, *few, [1]).nbytes


def test_buffers_are_not_copied_every_step():
    """Growth is by capacity: the buffer's size changes once per 256 tokens."""
    store = TokenArrays(growth=256)
    sizes = set()
    for _ in range(600):
        store.append({"x": mx.zeros((1, 1, 1, 4))})
        sizes.add(store.arrays["x"].shape[2])
    assert sizes == {256, 512, 768}
    assert store.view("x").shape == (1, 1, 600, 4)


@given(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.booleans())
def test_masks_agree_with_a_loop(offset, n, windowed, as_array):
    cache = tq.TurboQuantCache("3")
    if offset:
        cache.update_and_fetch(tokens(offset), tokens(offset, DV))
    window = 5 if windowed else None
    mask = cache.make_mask(n, return_array=as_array, window_size=window)
    if not isinstance(mask, mx.array):
        assert window is None
        assert mask == (None if n == 1 else "causal")
        return
    for i, row in enumerate(mask.tolist()):
        last = offset + i
        seen = [t <= last and (not windowed or t > last - 5) for t in range(offset + n)]
        assert row == seen


class AgainstAList(RuleBasedStateMachine):
    """Append and trim against a plain list of tokens; nothing may get lost."""

    bound = 0.02

    def __init__(self):
        super().__init__()
        self.cache = tq.TurboQuantCache("k8v8,window=5,page=32,sink=3")
        self.tokens = []
        self.next = 0

    @rule(n=st.one_of(st.integers(1, 8), st.integers(9, 70)))
    def append(self, n):
        new = tokens(n, seed=self.next)
        self.next += 1
        self.cache.update_and_fetch(new, new[..., :DV])
        self.tokens += [new[:, :, i] for i in range(n)]

    @precondition(lambda self: self.tokens)
    @rule(n=st.integers(1, 60))
    def trim(self, n):
        assert self.cache.trim(n) == min(n, len(self.tokens))
        self.tokens = self.tokens[: max(0, len(self.tokens) - n)]

    @rule()
    def save_and_load(self):
        self.cache = tq.TurboQuantCache.from_state(self.cache.state)

    @invariant()
    def holds_the_tokens(self):
        assert self.cache.offset == len(self.tokens)
        if not self.tokens:
            return
        keys, _ = self.cache.keys_and_values()
        want = mx.stack(self.tokens, axis=2)
        error = mx.linalg.norm(stored(keys) - want, axis=-1)
        assert (error / mx.linalg.norm(want, axis=-1)).max().item() < self.bound


TestAgainstAList = AgainstAList.TestCase
