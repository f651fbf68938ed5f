"""Prompt-cache files whose checksum is right and whose content is not."""

import json
import os
import struct
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as host_cache
import numpy as np
import pytest
import tiny_models
from hypothesis import example, given
from hypothesis import strategies as st

import mlx_turboquant as tq
from mlx_turboquant.errors import FormatError, SpecError, TurboQuantError
from mlx_turboquant.integrations import hook, prompt_files, prompt_fit, prompt_headers

SPEC = "4,window=4,sink=2,page=32"
#: More than a page is codes in each layer.
TOKENS = 80

pytestmark = pytest.mark.filterwarnings("ignore:.*caches")


def logits_after(model, caches):
    return model(mx.array([[7]]), cache=caches)


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("qwen2")


@pytest.fixture(scope="module")
def states(model):
    """The layers' states, as they are saved."""
    caches = tq.make_prompt_cache(model, SPEC)
    ids = mx.random.randint(0, tiny_models.VOCAB, (1, TOKENS), key=mx.random.key(2))
    mx.eval(model(ids, cache=caches), [layer.state for layer in caches])
    assert all(layer.packed_length for layer in caches)
    return [layer.state for layer in caches]


def own_sample(names, states):
    """What the codes decode to as they are; none where there are no such layers."""
    try:
        caches = [
            hook.cache_class(name).from_state(state)
            for name, state in zip(names, states, strict=True)
        ]
        return prompt_fit.sample(caches)
    except Exception:  # whatever is wrong with them
        return "[]"


def write(path, states, names=None, metadata=None, sample=None):
    """A file of these states with the checksum that belongs to them."""
    names = names or ["TurboQuantCache"] * len(states)
    texts = {**(metadata or {})}
    texts["mlx_turboquant_checksum"] = prompt_files._checksum(names, states)
    texts[prompt_fit.SAMPLE] = own_sample(names, states) if sample is None else sample
    layers = [
        type(name, (), {"state": state})()
        for name, state in zip(names, states, strict=True)
    ]
    host_cache.save_prompt_cache(str(path), layers, texts)
    return path


@pytest.fixture(scope="module")
def good(model, states, tmp_path_factory):
    """(the sample, logits behind it) of the file as it should be."""
    path = tmp_path_factory.mktemp("good") / "c.safetensors"
    caches = tq.load_prompt_cache(write(path, states), model)
    return prompt_fit.sample(caches), logits_after(model, caches)


def refused_or_same(path, model, good):
    """A file is refused in one line, or is read as what it was before it changed."""
    started = time.perf_counter()
    try:
        caches = tq.load_prompt_cache(path, model)
        assert mx.allclose(logits_after(model, caches), good[1], atol=1e-4).item()
        return ""
    except TurboQuantError as error:
        refusal = str(error)
    assert time.perf_counter() - started < 5
    assert refusal
    assert "\n" not in refusal
    return refusal


HEADERS = {
    "bits": ("k4v4", "k3v4"),
    "value bits": ("k4v4", "k4v5"),
    "identity": ("k4v4", "k16v4"),
    "half bits": ("k4v4", "k4.5v4"),
    "codec": ("codec=turboquant", "codec=rotated-int4"),
    "trellis": ("codec=turboquant", "codec=trellis"),
    "research": ("codec=turboquant", "codec=research.affine"),
    "no codec": ("codec=turboquant", "codec=zip"),
    "sink": ("sink=2", "sink=3"),
    "no sink": ("sink=2", "sink=0"),
    "page": ("page=32", "page=64"),
    "no page": ("page=32", "page=0"),
    "center": ("center=page", "center=off"),
    "equalize": ("equalize=on", "equalize=off"),
    "seed": ("seed=0", "seed=1"),
    "tiles": ("tiles=0", "tiles=1"),
    "arrays": ("returns_arrays=0", "returns_arrays=1"),
    "flag": ("returns_arrays=0", "returns_arrays=2"),
    "twice": ("tiles=0", "tiles=0 tiles=0"),
    "window": ("tiles=0", "tiles=0 max_size=100"),
    "huge": ("tiles=0", "tiles=" + "9" * 5000),
    "auto": ("k4v4", "auto"),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_header_that_says_something_else_is_refused(
    case, everywhere, model, states, good, tmp_path
):
    old, new = HEADERS[case]
    changed = [
        {**state, "header": state["header"].replace(old, new)}
        if everywhere or layer == 1
        else state
        for layer, state in enumerate(states)
    ]
    assert changed[1]["header"] != states[1]["header"]
    path = write(tmp_path / "c.safetensors", changed, sample=good[0])
    assert refused_or_same(path, model, good)


def test_a_wider_window_is_only_a_later_page(model, states, good, tmp_path):
    """What it changes has not happened yet."""
    changed = [
        {**state, "header": state["header"].replace("window=4", "window=40")}
        for state in states
    ]
    path = write(tmp_path / "c.safetensors", changed, sample=good[0])
    assert refused_or_same(path, model, good) == ""


def nan(array):
    return mx.concatenate(
        [array[..., :-1], mx.full((*array.shape[:-1], 1), mx.nan)], -1
    )


CHANGES = {
    "shorter": lambda a: a[:, :, :-1],
    "narrower": lambda a: a[..., :-1],
    "longer": lambda a: mx.concatenate([a, a[:, :, :1]], axis=2),
    "one head": lambda a: a[:, :1],
    "two rows": lambda a: mx.concatenate([a, a]),
    "flat": lambda a: a.reshape(-1),
    "one more axis": lambda a: a[None],
    "empty": lambda a: a[:, :, :0],
    "no number": lambda a: mx.array(3),
    "wider type": lambda a: a.astype(mx.float32 if a.dtype.size < 4 else mx.int64),
    "bytes": lambda a: a.astype(mx.uint8),
    "NaN": lambda a: nan(a).astype(a.dtype),
    "infinite": lambda a: (a.astype(mx.float32) * mx.inf).astype(a.dtype),
    "axes": lambda a: a.swapaxes(1, 2),
}


def names_of(states):
    return sorted(set(states[0]) - {"header"})


@given(data=st.data())
def test_changed_arrays_are_refused_or_change_nothing(
    data, model, states, good, tmp_path_factory
):
    name = data.draw(st.sampled_from(names_of(states)))
    change = data.draw(
        st.sampled_from([*CHANGES, "gone", "renamed", "text", "other's"])
    )
    layers = data.draw(st.sampled_from([{0}, {3}, {0, 1, 2, 3}]))
    changed = [dict(state) for state in states]
    for layer in layers:
        array = changed[layer].pop(name)
        if change == "renamed":
            changed[layer][name + "s"] = array
        elif change == "text":
            changed[layer][name] = "words"
        elif change == "other's":
            changed[layer][name] = states[0]["packed:keys_words"]
        elif change != "gone":
            changed[layer][name] = CHANGES[change](array)
    path = tmp_path_factory.mktemp("bad") / "c.safetensors"
    refusal = refused_or_same(write(path, changed, sample=good[0]), model, good)
    integers = "words" in name and change in ("NaN", "infinite")
    own = change == "other's" and name == "packed:keys_words" and layers == {0}
    if not (integers or own):
        assert refusal


def test_every_array_of_a_layer_is_needed(model, states, good, tmp_path):
    names = names_of(states)
    assert len(names) == 11  # sink and recent, words and scales, means, gains
    for name in names:
        changed = [{k: v for k, v in states[0].items() if k != name}, *states[1:]]
        path = write(tmp_path / "c.safetensors", changed)
        assert "do not fit its header" in refused_or_same(path, model, good), name


def test_an_order_of_channels_is_one(tmp_path):
    """A channel that is not there would be read from elsewhere."""
    cache = tq.TurboQuantCache("3.5,codec=research.turboquant-outlier,window=4,page=32")
    for step in (80, 1):
        kv = mx.random.normal((1, 2, step, 64))
        cache.update_and_fetch(kv, kv)
    state = cache.state
    order = state["gains:keys_order"]
    for bad in (order + 1, mx.zeros_like(order)):
        with pytest.raises(FormatError, match="is no order of channels"):
            tq.TurboQuantCache.from_state({**state, "gains:keys_order": bad})


ROTATING = {
    "max_size=80": "max_size=10",
    "keep=0": "keep=5",
    "evicted_sink=2": "evicted_sink=1",
    "evicted_pages=32": "evicted_pages=33",
    "first_visible=": "first_visible=999",
}


def test_a_windows_numbers_fit_one_another():
    cache = tq.RotatingTurboQuantCache("4,window=4,sink=2,page=32", max_size=80)
    for step in (60, 60, 1):
        kv = mx.random.normal((1, 2, step, 64))
        cache.update_and_fetch(kv, kv)
    state = cache.state
    again = tq.RotatingTurboQuantCache.from_state(state)
    assert again.offset == cache.offset == 121
    for old, new in ROTATING.items():
        header = state["header"].replace(old, new)
        assert header != state["header"], old
        with pytest.raises(FormatError):
            tq.RotatingTurboQuantCache.from_state({**state, "header": header})
    with pytest.raises(FormatError, match="another kind of cache"):
        tq.TurboQuantCache.from_state(state)


def shorter_text(states):
    cache = tq.TurboQuantCache.from_state(states[0])
    cache.trim(3)
    return [cache.state, *states[1:]]


FILES = {
    "other lengths": shorter_text,
    "other order": lambda states: states[:3],
    "one more": lambda states: [*states, states[0]],
    "an empty layer": lambda states: [
        *states[:3],
        {"header": states[0]["header"]},
    ],
    "a list": lambda states: [*states[:3], list(states[3].values())],
    "a nothing": lambda states: [*states[:3], None],
}


@pytest.mark.parametrize("case", FILES)
def test_layers_that_are_not_of_one_text_are_refused(
    case, model, states, good, tmp_path
):
    path = write(tmp_path / "c.safetensors", FILES[case](states))
    assert refused_or_same(path, model, good)


@pytest.mark.parametrize(
    "name",
    [
        *("RotatingTurboQuantCache", "BatchTurboQuantCache", "KVCache", "ArraysCache"),
        *("RotatingKVCache", "CacheList", "dict", "mx", "make_prompt_cache", ""),
        *("_BaseCache", "BatchKVCache", "PromptTrie"),
    ],
)
def test_a_class_that_is_another_is_refused(name, model, states, good, tmp_path):
    names = ["TurboQuantCache"] * 3 + [name]
    path = write(tmp_path / "c.safetensors", states, names)
    assert refused_or_same(path, model, good)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": (1, 2, 80, 8)},
        {"values": (1, 4, 80, 16)},
        {"keys": (1, 2, 80, 16), "offset": 99},
        {"offset": -1},
        {"offset": 79},
        {"keys": (80, 16)},
        {"keys": (2, 2, 80, 16), "values": (2, 2, 80, 16)},
    ],
)
def test_mlx_lms_own_caches_are_checked_too(change, model, states, good, tmp_path):
    shape = (1, 2, 80, 16)
    keys, values = (
        mx.random.normal(change.get(side, shape)) for side in ("keys", "values")
    )
    layers = [*states[:3], (keys, values, change.get("offset", 80))]
    names = ["TurboQuantCache"] * 3 + ["KVCache"]
    path = write(tmp_path / "c.safetensors", layers, names)
    assert refused_or_same(path, model, good)
    with_nan = [*states[:3], (mx.full(shape, mx.nan), mx.zeros(shape), 80)]
    path = write(tmp_path / "c.safetensors", with_nan, names)
    assert "finite" in refused_or_same(path, model, good)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ARRAY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
RAW = {
    "nothing": b"",
    "short": b"\x00" * 7,
    "long": struct.pack("<Q", 2**62),
    "no end": struct.pack("<Q", 2**20) + b"{}",
    "a list": raw([]),
    "deep": raw(b"[" * 200_000),
    "texts": raw({"__metadata__": [1]}),
    "numbers": raw({"__metadata__": {"1.0": 3}}),
    # A list that is as long as its last number says.
    "far layer": raw({"__metadata__": {"1.0": "KVCache", "1.999999999": "KVCache"}}),
    "far text": raw({"__metadata__": {"1.0": "KVCache", "2.999999999.0": "x"}}),
    "far array": raw(
        {"__metadata__": {"1.0": "KVCache"}, "0.999999999": ARRAY}, b"1234"
    ),
    "far group": raw({"__metadata__": {"999999999.0": "KVCache"}}),
    "deep array": raw(
        {"__metadata__": {"1.0": "K"}, "0" + ".0" * 5000: ARRAY}, b"1234"
    ),
    "shape": raw({"0": {**ARRAY, "shape": [-1]}}, b"1234"),
    "huge shape": raw({"0": {**ARRAY, "shape": [2**40]}}, b"1234"),
    "offsets": raw({"0": {**ARRAY, "data_offsets": [0, 400]}}, b"1234"),
    "overlap": raw({"0": {**ARRAY, "data_offsets": [4, 0]}}, b"1234"),
    "dtype": raw({"0": {**ARRAY, "dtype": "F4"}}, b"1234"),
    "entry": raw({"0": 3}),
}


@pytest.mark.parametrize("case", RAW)
def test_containers_are_refused_at_once(case, model, good, tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(RAW[case])
    assert "cannot read a prompt cache" in refused_or_same(path, model, good)


@pytest.fixture(scope="module")
def file_bytes(states, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "c.safetensors"
    return write(path, states).read_bytes()


@given(
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    in_header=st.booleans(),
)
@example(places=[], cut=None, in_header=False)
def test_changed_bytes_are_refused_or_change_nothing(
    places, cut, in_header, file_bytes, model, good, tmp_path_factory
):
    changed = bytearray(file_bytes)
    (header,) = struct.unpack("<Q", file_bytes[:8])
    stop = 8 + header if in_header else len(changed)
    for place, value in places:
        changed[int(place * (stop - 1))] = value
    if cut is not None:
        del changed[int(cut * len(changed)) :]
    path = tmp_path_factory.mktemp("bytes") / "c.safetensors"
    path.write_bytes(bytes(changed))
    refusal = refused_or_same(path, model, good)
    if bytes(changed) == file_bytes:
        assert refusal == ""
    elif not in_header:
        assert refusal


@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["__metadata__", "0", "0.0", "0.header", "1.0", "2.0", "2.1.0"]
                )
                | st.text(max_size=5),
                inner
                | st.just(ARRAY)
                | st.fixed_dictionaries(
                    {
                        "dtype": st.sampled_from(["F32", "I32", "BOOL", "X"]),
                        "shape": st.lists(st.integers(-1, 4), max_size=4),
                        "data_offsets": st.lists(st.integers(-1, 70), max_size=3),
                    }
                ),
                max_size=5,
            )
        ),
        max_leaves=12,
    ),
    data=st.binary(max_size=64),
)
def test_any_header_is_refused_in_a_line(header, data, model, good, tmp_path_factory):
    path = tmp_path_factory.mktemp("header") / "c.safetensors"
    path.write_bytes(raw(header, data))
    assert refused_or_same(path, model, good)


def test_mlx_lm_says_who_reads_our_files(model, states, tmp_path):
    caches = [tq.TurboQuantCache.from_state(state) for state in states]
    tq.save_prompt_cache(tmp_path / "c", caches)
    hook.remove()
    with pytest.raises(KeyError, match=r"mlx_turboquant reads .*mlx_tq\.generate"):
        host_cache.load_prompt_cache(str(tmp_path / "c.safetensors"))
    hook.register()
    again = host_cache.load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert [type(cache) for cache in again] == [tq.TurboQuantCache] * 4
    hook.remove()


def test_what_codes_decode_to_is_compared_in_either_order(states):
    """The sample is of vectors, whatever order a backend keeps codes in."""
    cache = tq.TurboQuantCache.from_state(states[0])
    keys, values = tq.attention.dequantize(*cache.compressed())
    first = cache.sink_length + cache.packed_length - 1
    (sample,) = json.loads(prompt_fit.sample([cache]))
    for side, said in zip((keys, values), sample, strict=True):
        assert np.allclose(np.array(side[0, 0, first, :8]), said, atol=1e-4)
    prompt_fit.check_sample([cache], prompt_fit.sample([cache]))
    for text in ("[]", "null", "[[[1],[2]]]", "{", '[[["a"],["b"]]]', "[[0,0]]"):
        with pytest.raises(FormatError, match="are not what was saved"):
            prompt_fit.check_sample([cache], text)


def test_our_own_files_have_a_sample(model, states, good, tmp_path):
    """mlx-lm's have none, nor do layers without codes."""
    path = write(tmp_path / "c.safetensors", states)
    arrays, texts = mx.load(str(path), return_metadata=True)
    del texts[f"0.{prompt_fit.SAMPLE}"]
    mx.save_safetensors(str(path), arrays, texts)
    assert "no sample of what they decode to" in refused_or_same(path, model, good)
    del texts["0.mlx_turboquant_checksum"]
    mx.save_safetensors(str(path), arrays, texts)
    assert refused_or_same(path, model, good) == ""
    prompt_fit.check_sample([tq.TurboQuantCache(tq.CacheSpec.parse(SPEC))], None)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_scale_below_zero_is_refused(side, model, states, good, tmp_path):
    """Of a vector that the sample does not have."""
    name = f"packed:{side}_scales"
    scales = mx.array(states[1][name])
    scales[0, 0, 0] = -scales[0, 0, 0]
    changed = [states[0], {**states[1], name: scales}, *states[2:]]
    path = write(tmp_path / "c.safetensors", changed, sample=good[0])
    assert f"{name} is not 0 or above" in refused_or_same(path, model, good)


def test_what_could_not_be_read_is_not_written(states, tmp_path, monkeypatch):
    cache = [tq.TurboQuantCache.from_state(states[0])]
    file = tmp_path / "c.safetensors"
    tq.save_prompt_cache(file, cache, {"a": "kept"})
    monkeypatch.setattr(prompt_headers, "_MOST_HEADER", 10**5)
    with pytest.raises(SpecError, match=r"header has \d+ bytes, .* keep less beside"):
        tq.save_prompt_cache(file, cache, {"a": "x" * 10**5})
    with pytest.raises(SpecError, match="and texts alone"):
        tq.save_prompt_cache(file, cache, {"a": 1})
    assert tq.load_prompt_cache(file, return_metadata=True)[1] == {"a": "kept"}
    for nothing in ([], (), None, 3):
        with pytest.raises(SpecError, match="is no prompt cache; give what"):
            tq.save_prompt_cache(file, nothing)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("limit", [0, -1, 8192.5, 8192.0, "8192", True, 2**31, [1]])
def test_a_limit_is_a_number_of_tokens(limit, model):
    for make in (tq.make_prompt_cache, tq.apply):
        with pytest.raises(SpecError, match="is no whole number in 1"):
            make(model, 3, max_kv_size=limit)


PATHS = ["", "/", ".", "..", "a\0b", "x" * 300, "/x" * 3000, "/nowhere/x", "folder"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_are_none_are_refused_in_a_line(path, states, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    cache = [tq.TurboQuantCache.from_state(states[0])]
    with pytest.raises(FormatError, match="cannot read a prompt cache from"):
        tq.load_prompt_cache(path)
    with pytest.raises(SpecError, match="cannot write a prompt cache to"):
        tq.save_prompt_cache(path, cache)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "folder",
        "folder.safetensors",
    ]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("plain", r"\(it is a folder\); name a file in it"),
        ("plain/", r"\(it is a folder\); name a file in it"),
        ("taken", r"\(it is a folder\); name a file in it"),
        ("/dev/zero", r"\(it is a device, no regular file\); name another file"),
        ("pipe", r"\(it is a pipe, no regular file\); name another file"),
    ],
)
def test_what_is_no_file_is_said(path, says, states, tmp_path, monkeypatch):
    """And no file is written beside it."""
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "taken.safetensors"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    cache = [tq.TurboQuantCache.from_state(states[0])]
    with pytest.raises(FormatError, match=says):
        tq.load_prompt_cache(path)
    with pytest.raises(SpecError, match=says):
        tq.save_prompt_cache(path, cache)
    assert sorted(tmp_path.iterdir()) == before
    assert not Path("/dev/zero.safetensors").exists()
    if path == "plain":
        tq.save_prompt_cache("plain/c", cache)
        (tmp_path / "plain" / "c.safetensors").rename("plain.safetensors")
        assert len(tq.load_prompt_cache("plain.safetensors")) == 1
        with pytest.raises(FormatError, match=says):  # which of them is meant?
            tq.load_prompt_cache(path)
