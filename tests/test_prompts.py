"""Prompts: what they hold at once, in which order layers come, how buffers grow."""

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

import mlx_turboquant as tq
from mlx_turboquant import memory, pacing
from mlx_turboquant.backends import reference
from mlx_turboquant.backends.call import in_numbers
from mlx_turboquant.integrations.footprint import of_network
from mlx_turboquant.tokens import TokenArrays, capacity_of

pytestmark = pytest.mark.usefixtures("hooked")
CHUNK = 256


def model_of(layers, hidden=128):
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=3 * hidden,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=tiny_models.VOCAB,
    )
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model


def read(model, cache, tokens, chunk=CHUNK):
    """A prompt as mlx-lm reads it."""
    ids = mx.random.randint(0, tiny_models.VOCAB, (1, tokens))
    for at in range(0, tokens, chunk):
        model(ids[:, at : at + chunk], cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()


def peak_above(model, cache, tokens):
    """Bytes at most while a prompt is read, above what was there before."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read(model, cache, tokens)
    return mx.get_peak_memory() - before


def test_a_prompt_holds_its_codes_and_two_slices():
    """Twice the tokens: twice the codes, and of the rest only slices grow."""
    model, rest = model_of(8), {}
    for tokens in (4096, 8192):
        cache = tq.make_prompt_cache(model, "k3v3")
        peak = peak_above(model, cache, tokens)
        rest[tokens] = peak - sum(layer.nbytes for layer in cache)
    # Keys and values of a layer's one head, decoded to float32.
    decoded = 4096 * 2 * 64 * 4
    assert rest[8192] - rest[4096] < memory.IN_FLIGHT * 1.2 * decoded
    assert peak < 0.7 * peak_above(model, make_prompt_cache(model), tokens)


def test_peaks_are_predicted():
    """In proportion to what the model's layers compute, its caches and slices."""
    narrow, wide = (of_network(model_of(4, hidden)) for hidden in (128, 256))
    assert wide.activations == 2 * narrow.activations - 2 * narrow_of_attention()
    spec = tq.CacheSpec.parse("k3v3")
    for tokens in (1000, 100_000):
        cache = narrow.cache_bytes(tokens, spec)
        rest = narrow.prompt_bytes(tokens, spec) - cache - narrow.activations
        assert rest == 2 * min(reference.SLICE_BYTES, narrow.cache_bytes(tokens) // 4)
    assert narrow.prompt_bytes(1000) == narrow.cache_bytes(1000) + narrow.activations


def narrow_of_attention():
    """Queries, keys and values do not widen with the model, in bytes of two layers."""
    return 2 * (2 * 64 + 2 * 64) * 2048 * 2 // 1


class Recorder:
    """Notes which arrays are asked for and waited for."""

    def __init__(self, monkeypatch):
        self.log = []
        monkeypatch.setattr(pacing.mx, "async_eval", self.asked)
        monkeypatch.setattr(pacing.mx, "eval", self.waited)

    def asked(self, arrays):
        self.log.append(("ask", [id(array) for array in arrays]))

    def waited(self, arrays):
        self.log.append(("wait", [id(array) for array in arrays]))


def test_each_layer_waits_for_the_one_before(monkeypatch):
    monkeypatch.setattr(pacing._pacer, "latest", ())
    layers = [[mx.zeros(3), mx.ones(3)] for _ in range(3)]
    recorder = Recorder(monkeypatch)
    for arrays in layers:
        pacing.pace(arrays)
    ids = [[id(array) for array in arrays] for arrays in layers]
    assert recorder.log == [
        ("ask", ids[0]),
        ("ask", ids[1]),
        ("wait", ids[0]),
        ("ask", ids[2]),
        ("wait", ids[1]),
    ]
    # What is gone is not waited for, nor kept.
    del layers[2], arrays
    recorder.log.clear()
    pacing.pace(layers[0])
    assert recorder.log == [("ask", ids[0])]


def test_what_cannot_be_waited_for_is_forgotten(monkeypatch):
    """Of another cache, say: the next prompt does not meet it again."""
    monkeypatch.setattr(pacing._pacer, "latest", ())
    gone, ours = [mx.zeros(3)], [mx.ones(3)]
    pacing.pace(gone)

    def failing(arrays):
        raise RuntimeError("no primitive")

    with monkeypatch.context() as patch:
        patch.setattr(pacing.mx, "eval", failing)
        with pytest.raises(RuntimeError, match="no primitive"):
            pacing.pace(ours)
        pacing.pace(ours)
    assert [ref() for ref in pacing._pacer.latest] == ours


def test_other_refusals_are_not_swallowed(monkeypatch):
    def failing(arrays):
        raise ValueError("out of range")

    monkeypatch.setattr(pacing.mx, "async_eval", failing)
    with pytest.raises(ValueError, match="out of range"):
        pacing.pace([mx.zeros(3)])


def test_masks_become_numbers_without_a_wider_copy():
    mask, q = mx.random.uniform(shape=(256, 8192)) > 0.5, mx.zeros(1, mx.bfloat16)
    mx.eval(mask)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    numbers = in_numbers(mask, q)
    mx.eval(numbers)
    assert numbers.dtype == mx.bfloat16
    assert mx.get_peak_memory() - before < 1.2 * numbers.nbytes


@pytest.mark.parametrize(("chunk", "paced"), [(1, False), (64, False), (512, True)])
def test_long_steps_are_paced(chunk, paced, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "mlx_turboquant.cache.layer.pace", lambda arrays: calls.append(len(arrays))
    )
    model = model_of(2)
    cache = tq.make_prompt_cache(model, "k3v3,page=32,window=8")
    read(model, cache, 512, chunk=chunk)
    assert bool(calls) is paced
    assert set(calls) <= {7}  # words, scales, means; recent tokens


def test_slices_of_heads_are_paced(monkeypatch):
    calls = []
    monkeypatch.setattr(reference, "pace", lambda arrays: calls.append(len(arrays)))
    cache = tq.TurboQuantCache("k8v8")
    for _ in range(2):
        kv = mx.random.normal((1, 4, 300, 64))
        sides = cache.update_and_fetch(kv, kv)
    call = reference.AttendCall(mx.random.normal((1, 4, 300, 64)), *sides, 0.1)
    whole = reference.Reference().attend(call)
    assert not calls
    monkeypatch.setattr(reference, "SLICE_BYTES", 1)
    assert mx.allclose(reference.Reference().attend(call), whole, atol=1e-5)
    assert calls == [1] * 4


def test_buffers_grow_seldom_and_in_few_sizes():
    """100,000 tokens, 128 at a time: under 1/32 is spare, few copies, few sizes."""
    tokens = TokenArrays(growth=128)
    rows = mx.zeros((1, 1, 128, 1), mx.uint8)
    sizes, copied = [], 0
    for _ in range(800):
        before = tokens.arrays.get("x")
        tokens.append({"x": rows})
        buffer = tokens.arrays["x"]
        if buffer is not before:
            sizes.append(buffer.shape[2])
            copied += tokens.length
        assert tokens.length <= buffer.shape[2] <= tokens.length * 33 / 32 + 128
    assert len(sizes) == len(set(sizes)) < 200
    assert copied < 50 * tokens.length  # growing by 128 alone: 400 times
    assert capacity_of(0, 8) == capacity_of(8, 8) == 8
    begun = TokenArrays(growth=180, first=32)
    for count, capacity in ((5, 32), (27, 32), (1, 180)):
        begun.append({"x": mx.zeros((1, 1, count, 4))})
        assert begun.arrays["x"].shape[2] == capacity
    begun.replace({"x": mx.zeros((1, 1, 3, 4))})  # no beginning any more
    assert begun.arrays["x"].shape[2] == 180


def test_a_short_text_takes_little_and_is_described_in_words():
    """Not as so many times larger than fp16, which buffers are until they are full."""
    model = model_of(2)
    cache = tq.make_prompt_cache(model, "3,window=8,page=32")
    read(model, cache, 5)
    tokens = 32 * 2 * 64 * 4  # keys and values of 64 elements, float32
    assert [layer.nbytes for layer in cache] == [tokens, tokens]
    said = tq.explain(cache)
    assert said.summary() == (
        "32.8 kB, no codes yet: they begin behind 44 tokens; "
        "k3v3,window=8,page=32 in 2 of 2 layers"
    )
    assert "bits per element" not in f"{said}{cache[0]}"
    assert "no codes yet)" in str(cache[0])
    read(model, cache, 40)
    read(model, cache, 1)
    assert "bits per element" in tq.explain(cache).summary()
    assert "bits per element)" in str(cache[0])


def test_a_long_step_leaves_no_room_and_copies_nothing():
    """Its tokens are the buffer; the next short step's get room."""
    tokens = TokenArrays(growth=64)
    given = mx.random.normal((1, 2, 300, 4))
    tokens.append({"x": given}, spare=False)
    assert tokens.arrays["x"].shape[2] == 300
    tokens.append({"x": given[:, :, :1]})
    assert tokens.arrays["x"].shape[2] == 320
    assert mx.array_equal(tokens.view("x")[:, :, :300], given).item()


def text_of(tokens, heads=2):
    """Queries, keys and values of 64 elements."""
    return [
        mx.random.normal((1, count, tokens, 64)) for count in (2 * heads, heads, heads)
    ]


def chunk(cache, text, mask="causal"):
    q, k, v = text
    return tq.attend(q, *cache.update_and_fetch(k, v), 0.125, mask)


@pytest.mark.parametrize("steps", [4, 300])
def test_rows_that_see_nothing_are_finite(steps):
    """As of padding: MLX's own attention gives them zeros, whatever, but numbers."""
    cache = tq.TurboQuantCache("k4v4")
    chunk(cache, text_of(600))
    mask = mx.ones((steps, 600 + steps), mx.bool_)
    mask[0] = False
    out = chunk(cache, text_of(steps), mask)
    assert cache.packed_length
    assert mx.all(mx.isfinite(out)).item()


def test_prompts_may_be_a_part_of_a_graph():
    """Compiled: then there is nothing to compute in turn."""
    first, second = text_of(600), text_of(300)

    def outputs(k):
        cache = tq.TurboQuantCache("k8v8")
        chunk(cache, [first[0], k, first[2]])
        return chunk(cache, second)

    want = outputs(first[1])
    assert mx.allclose(mx.compile(outputs)(first[1]), want, atol=1e-4).item()


def test_long_steps_that_are_not_packed_yet_leave_room():
    """Else each of them would copy all before it."""
    cache, sizes = tq.TurboQuantCache("k3v3,window=1024"), set()
    for _ in range(40):
        chunk(cache, text_of(20))
        sizes.add(cache._tokens.recent.arrays["keys"].shape[2])
    assert len(sizes - {32}) == 1  # behind the small one that a text begins with
