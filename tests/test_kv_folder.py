"""Texts that outlive the process: records, what fails, restored caches, kills."""

import errno
import hashlib
import inspect
import json
import logging
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.request

import agents
import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from mlx.utils import tree_flatten
from serving_tools import LIMIT, options, until

import mlx_turboquant as tq
from mlx_turboquant.conversations import disk
from mlx_turboquant.conversations.disk import DiskFolder, Record
from mlx_turboquant.conversations.records import pack, unpack
from mlx_turboquant.errors import SpecError
from mlx_turboquant.integrations import prompt_store, server, text_writer
from mlx_turboquant.integrations.prompt_store import PromptStore
from mlx_turboquant.integrations.saved_texts import SavedTexts
from mlx_turboquant.spec import CacheSpec

SPEC = "k4v3,page=32,window=8"
TEXT = np.random.default_rng(3).integers(0, 16384, 400).astype(np.int32)


def key(i):
    return hashlib.blake2b(str(i).encode(), digest_size=16).digest()


def record(i, size=1000, parent=b"p"):
    data = np.random.default_rng(i).integers(0, 256, size, np.uint8)
    return Record(key(i), parent, 1, [data[:100].data, data[100:].data])


def whole(one):
    return b"".join(bytes(part) for part in one.data)


@pytest.fixture
def folder(tmp_path):
    made = DiskFolder(tmp_path / "kv", limit=10**6)
    yield made
    made.close()


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.folder.glob("*.kv"))


# Records.


def test_records_are_written_once_and_read_by_another(folder):
    records = [record(i) for i in range(5)]
    assert folder.write(records[:3])
    assert folder.write(records)
    assert bytes_in(folder) == folder.nbytes == 5000
    other = DiskFolder(folder.folder, 10**6)
    assert other.known([key(i) for i in (0, 1, 9, 2)]) == 2
    found = other.read([key(4), key(0)])
    assert [data.tobytes() for data in found] == [whole(records[i]) for i in (4, 0)]
    assert {k for k, _ in other.children(b"p", 1)} == {one.key for one in records}
    assert other.children(b"p", 2) == []
    # Each appends to files of its own.
    assert other.write([record(7)], behind=key(2))
    assert folder.write([record(8)])
    assert folder.read([key(7)]) is not None
    other.close()


def test_what_goes_on_from_a_file_s_end_is_in_that_file(folder):
    folder.write([record(1)])
    folder.write([record(2)], behind=key(1))
    assert len(list(folder.folder.glob("*.kv"))) == 1
    folder.write([record(3)], behind=key(1))  # a fork
    assert len(list(folder.folder.glob("*.kv"))) == 2


def test_it_is_its_owners_alone(folder):
    folder.write([record(1)])
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700
    (file,) = folder.folder.glob("*.kv")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.stem) == 16
    int(file.stem, 16)


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_a_line_in_the_log_and_a_miss(folder, caplog, harm):
    folder.write([record(1), record(2)])
    (file,) = folder.folder.glob("*.kv")
    data = bytearray(file.read_bytes())
    if harm == "flipped":
        data[1500] ^= 1
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(data[:1500])
    else:
        file.unlink()
    assert folder.read([key(1), key(2)]) is None
    assert ("is damaged" in caplog.text) != (harm == "gone")
    assert len(caplog.records) == 1
    if harm != "gone":
        assert folder.read([key(1)])[0].tobytes() == whole(record(1))
        assert folder.known([key(1), key(2)]) == 1
    # It can be written again.
    assert folder.write([record(2)])
    assert folder.read([key(2)])[0].tobytes() == whole(record(2))


def test_the_limit_drops_what_was_not_used_for_longest(tmp_path):
    folder = DiskFolder(tmp_path / "kv", limit=3500)
    for i in range(3):
        folder.write([record(i)])
        time.sleep(0.01)
    folder.read([key(0)])
    assert folder.write([record(3)])
    assert bytes_in(folder) == folder.nbytes == 3000
    assert [folder.known([key(i)]) for i in range(4)] == [1, 0, 1, 1]
    assert not folder.write([record(9, 4000)])
    assert folder.nbytes == 3000


def test_an_hour_s_bytes_are_all_that_is_written(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    folder = DiskFolder(tmp_path / "kv", 10**6, hourly=2500)
    other = DiskFolder(tmp_path / "kv", 10**6, hourly=2500)
    assert folder.write([record(1)])
    assert other.write([record(2)])
    assert not folder.write([record(3)])
    assert not folder.write([record(3)])
    assert caplog.text.count("more of texts in the next hour") == 1
    assert folder.write([record(1)]), "what is there needs no writing"
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert folder.write([record(3)])
    off = DiskFolder(tmp_path / "kv", 10**6, hourly=0)
    assert not off.write([record(4)])
    assert off.read([key(1)]) is not None
    other.close()


def test_a_full_disk_is_a_line_in_the_log(folder, caplog, monkeypatch):
    folder.write([record(1)])

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not folder.write([record(2)], behind=key(1))
    assert "No space left" in caplog.text
    assert bytes_in(folder) == 1000
    assert not folder.write([record(2)]), "not at once again"
    monkeypatch.setattr(disk, "_PAUSE", 0)
    folder._paused_until = 0
    assert folder.write([record(2)], behind=key(1))
    assert folder.read([key(1), key(2)])[1].tobytes() == whole(record(2))


def test_foreign_folders_and_indices(tmp_path, caplog):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("Dear")
    with pytest.raises(SpecError, match=r"letters holds other files; give a new"):
        DiskFolder(tmp_path / "letters", 10**6)
    assert (tmp_path / "letters" / "a.txt").read_text() == "Dear"
    with pytest.raises(SpecError, match=r"a\.txt cannot be used .*; give a folder"):
        DiskFolder(tmp_path / "letters" / "a.txt", 10**6)
    folder = DiskFolder(tmp_path / "kv", 10**6)
    folder.write([record(1)])
    folder.close()
    (tmp_path / "kv" / "index.sqlite").write_bytes(b"no index" * 1000)
    again = DiskFolder(tmp_path / "kv", 10**6)
    assert "damaged" in caplog.text
    assert again.nbytes == bytes_in(again) == 0
    assert again.write([record(1)])


def test_a_folder_of_another_version_is_left_as_it_is(tmp_path):
    folder = DiskFolder(tmp_path / "kv", 10**6)
    folder.write([record(1)])
    folder.close()
    with sqlite3.connect(tmp_path / "kv" / "index.sqlite") as index:
        index.execute("PRAGMA user_version = 2")
    index.close()
    with pytest.raises(SpecError, match=r"is of version 2, this package writes 1"):
        DiskFolder(tmp_path / "kv", 10**6)
    assert len(list((tmp_path / "kv").glob("*.kv"))) == 1


def test_forgetting_empties_it_while_others_use_it(folder):
    folder.write([record(1)])
    assert DiskFolder(folder.folder, 10**6).forget() == 1000
    assert bytes_in(folder) == 0
    assert folder.read([key(1)]) is None
    assert folder.write([record(2)], behind=key(1))
    assert folder.read([key(2)])[0].tobytes() == whole(record(2))


def test_packed_trees_come_back():
    tree = {
        "a": [mx.arange(6).reshape(2, 3).astype(mx.bfloat16), None, "text"],
        "b": {"c": mx.zeros((1, 2, 0, 4), mx.float16), "d": 3, "e": [True, 0.5]},
    }
    data = np.frombuffer(b"".join(bytes(part) for part in pack(tree)), np.uint8)
    back = unpack(data)
    assert back["a"][0].dtype == mx.bfloat16
    assert mx.array_equal(back["a"][0], tree["a"][0]).item()
    assert back["b"]["c"].shape == (1, 2, 0, 4)
    assert (back["a"][1:], back["b"]["d"], back["b"]["e"]) == (
        [None, "text"],
        3,
        [True, 0.5],
    )


# Texts.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny models by name, loaded once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            path = agents.save_tiny(name, tmp_path_factory.mktemp("tiny"))
            loaded[name] = tq.load(str(path))[0]
        return loaded[name]

    return get


def read(model, caches, tokens):
    logits = model(mx.array(tokens)[None], cache=caches)
    mx.eval(logits, [cache.state for cache in caches])
    return logits


def leaves(caches):
    return {
        name: leaf if not isinstance(leaf, mx.array) else np.array(leaf).tobytes()
        for name, leaf in tree_flatten([cache.state for cache in caches])
    }


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", SPEC),
        ("llama", "k16v4,page=32,window=8"),
        pytest.param("llama", "auto,page=32,window=8,sink=0", marks=pytest.mark.slow),
        ("hybrid", SPEC),
        ("hybrid (mamba)", SPEC),
        ("sliding window", SPEC),
    ],
)
@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_a_restored_text_is_what_was_saved(tiny, folder, name, spec, hooked):
    model = tiny(name)
    caches = tq.make_prompt_cache(model, spec)
    saved = SavedTexts(folder, [model], tq.make_prompt_cache(model, spec))
    assert saved.longest(TEXT) is None
    read(model, caches, TEXT[:180])
    read(model, caches, TEXT[180:250])
    assert saved.save(TEXT[:250], caches, whole=True)
    first = folder.nbytes
    assert saved.save(TEXT[:250], caches, whole=True)
    assert folder.nbytes == first
    tokens, back = saved.load(TEXT, least=250)
    assert list(tokens) == list(TEXT[:250])
    assert leaves(back) == leaves(caches)
    # It goes on as what was kept, and only what is new is written then.
    one, other = (read(model, each, TEXT[250:330]) for each in (caches, back))
    assert mx.array_equal(one, other).item()
    assert leaves(back) == leaves(caches)
    assert saved.save(TEXT[:330], back, whole=False)
    if name == "llama":
        assert first < folder.nbytes < 1.5 * first


def test_without_its_tail_a_text_is_cut_at_a_page(tiny, folder, hooked):
    model = tiny("llama")
    saved = SavedTexts(folder, [model], tq.make_prompt_cache(model, SPEC))
    caches = tq.make_prompt_cache(model, SPEC)
    read(model, caches, TEXT[:250])
    assert saved.save(TEXT[:250], caches, whole=False)
    packed = caches[0].packed_length
    assert packed % 32 == 0
    tokens, back = saved.load(TEXT, least=1)
    assert len(tokens) == back[0].offset == 4 + packed
    for cache in caches:
        cache.trim(250 - 4 - packed)
    assert leaves(back) == leaves(caches)
    # A text that parts within a page has the pages before it.
    other = np.concatenate([TEXT[:150], TEXT[:100]])
    tokens, back = saved.load(other, least=1)
    assert len(tokens) == back[0].offset == 4 + 146 // 32 * 32
    one, two = read(model, back, other[len(tokens) :]), tq.make_prompt_cache(model, 8)
    want = read(model, two, other)[:, len(tokens) :]
    assert mx.mean(mx.abs(one - want)) < 0.3 * mx.mean(mx.abs(want))


@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_a_hybrid_without_its_tail_is_a_miss(tiny, folder, hooked):
    model = tiny("hybrid")
    caches, empty = (tq.make_prompt_cache(model, SPEC) for _ in range(2))
    saved = SavedTexts(folder, [model], empty)
    read(model, caches, TEXT[:250])
    assert saved.save(TEXT[:250], caches, whole=False)
    assert folder.nbytes > 0
    assert saved.longest(TEXT) is None
    assert saved.save(TEXT[:250], caches, whole=True)
    assert saved.longest(TEXT[:249]) is None  # it stands at its last token
    assert saved.longest(TEXT).length == 250


def test_other_models_and_specs_do_not_find_it(tiny, folder, hooked):
    model = tiny("llama")
    caches = tq.make_prompt_cache(model, SPEC)
    read(model, caches, TEXT)
    SavedTexts(folder, [model], tq.make_prompt_cache(model, SPEC)).save(
        TEXT, caches, whole=True
    )
    other_spec = tq.make_prompt_cache(model, "k4v4,page=32,window=8")
    assert SavedTexts(folder, [model], other_spec).longest(TEXT) is None
    weight = model.layers[1].mlp.up_proj
    kept, weight.weight = weight.weight, weight.weight * 1.001
    other = SavedTexts(folder, [model], tq.make_prompt_cache(model, SPEC))
    assert other.longest(TEXT) is None
    weight.weight = kept
    same = SavedTexts(folder, [model], tq.make_prompt_cache(model, SPEC))
    assert same.longest(TEXT).length == 400


def test_a_damaged_page_leaves_those_before_it(tiny, folder, hooked, caplog):
    model = tiny("llama")
    caches = tq.make_prompt_cache(model, SPEC)
    read(model, caches, TEXT)
    saved = SavedTexts(folder, [model], tq.make_prompt_cache(model, SPEC))
    saved.save(TEXT, caches, whole=True)
    (file,) = folder.folder.glob("*.kv")
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)
    tokens, back = saved.load(TEXT, least=1)
    assert 100 < len(tokens) == back[0].offset < 390
    assert "damaged" in caplog.text


# Servers.


class Running:
    """A generator of a saved tiny model, with a folder."""

    def __init__(self, path, kv):
        given = options(model=str(path), chat_template=agents.TEMPLATE)
        folder = None if kv is None else DiskFolder(kv, 10**9)
        self.store = PromptStore(given.prompt_cache_size, folder=folder)
        provider = server.Provider(given, CacheSpec.parse(SPEC))
        self.generator = server.Generator(provider, self.store)
        self.session = agents.Session(self.generator, answer_tokens=16)

    def close(self):
        self.generator.stop_and_join()


@pytest.mark.parametrize("name", ["llama", "hybrid"])
@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_a_restart_changes_no_answer(tmp_path, name, caplog):
    caplog.set_level(logging.ERROR)
    path, answers, read_ = agents.save_tiny(name, tmp_path / name), [], []
    for restarts in (False, True):
        running = Running(path, tmp_path / "kv" if restarts else None)
        talk = [{"role": "system", "content": agents.SYSTEM}]
        texts = []
        for text in ("Who was it?", "And then?", "And at last?"):
            talk.append({"role": "user", "content": text})
            texts.append(running.session.ask(talk))
            talk.append({"role": "assistant", "content": texts[-1]})
            if restarts:
                running.close()
                last = running.session
                running = Running(path, tmp_path / "kv")
                running.session._seen = last._seen
                running.session.read, running.session.new = last.read, last.new
        running.close()
        answers.append(texts)
        read_.append(running.session.read)
    assert answers[0] == answers[1]
    assert read_[0] == read_[1]


def test_idle_texts_are_written_and_evicted_ones_too(tiny, folder, hooked, monkeypatch):
    model = tiny("llama")
    store = prompt_store.PromptStore(max_size=1, folder=folder)
    store.open("m", [model], tq.make_prompt_cache(model, SPEC))
    caches = tq.make_prompt_cache(model, SPEC)
    read(model, caches, TEXT[:300])
    store.insert_cache("m", TEXT[:300].tolist(), caches)
    store.idle()
    assert folder.nbytes == 0
    monkeypatch.setattr(text_writer, "PAGES_AFTER", 0.0)
    store.idle()
    pages = folder.nbytes
    assert 0 < pages < sum(c._tokens.table.nbytes for c in caches) + 20_000
    store.idle()
    assert folder.nbytes == pages
    monkeypatch.setattr(text_writer, "PAGES_AFTER", 60.0)
    for start in 100, 50:  # one too many
        other = tq.make_prompt_cache(model, SPEC)
        read(model, other, TEXT[start:200])
        store.insert_cache("m", TEXT[start:200].tolist(), other)
        assert len(store) == 1
    # The second went with its pages; what is behind them is as much as they are.
    assert 1.2 * pages < folder.nbytes < 1.4 * pages
    back, rest = store.fetch_nearest_cache("m", TEXT.tolist())
    assert (back[0].offset, len(rest)) == (4 + 32 * 9, 400 - 4 - 32 * 9)
    assert store.fetch_nearest_cache("other", TEXT.tolist())[0] is None


def kept_in(folder, model, texts):
    """A store that has read texts, and what it writes."""
    store = prompt_store.PromptStore(max_size=len(texts), folder=folder)
    store.open("m", [model], tq.make_prompt_cache(model, SPEC))
    for tokens in texts:
        caches = tq.make_prompt_cache(model, SPEC)
        read(model, caches, tokens)
        store.insert_cache("m", tokens.tolist(), caches)
    return store, store._writer.saved["m"]


def test_what_is_behind_pages_is_a_tenth_of_them(tiny, tmp_path, hooked, monkeypatch):
    """But of the last text, at the end; so a session writes what its cache takes."""
    monkeypatch.setattr(text_writer, "PAGES_AFTER", 0.0)
    monkeypatch.setattr(text_writer, "TAIL_AFTER", 0.0)
    folder = DiskFolder(tmp_path / "kv", 10**7)
    texts = [TEXT[start : start + 200] for start in range(0, 200, 8)]
    store, saved = kept_in(folder, tiny("llama"), texts)
    for _ in range(3 * len(texts)):
        store.idle()
    assert all(len(saved.longest(text).pages) == 5 for text in texts)
    assert 0 < saved.tail_bytes <= 0.1 * saved.page_bytes
    whole = [saved.longest(text).length == 200 for text in texts]
    assert 0 < sum(whole) < len(texts) / 2
    store.save_next()
    store.close()
    assert saved.longest(texts[-1]).length == 200
    assert sum(saved.longest(text).length == 200 for text in texts) <= sum(whole) + 1


def test_who_comes_meanwhile_waits_for_one_page(tiny, folder, hooked, monkeypatch):
    monkeypatch.setattr(text_writer, "PAGES_AFTER", 0.0)
    store, saved = kept_in(folder, tiny("llama"), [TEXT])
    waiting = iter([False] * 3 + [True])
    store.idle(lambda: next(waiting))
    assert len(saved.longest(TEXT).pages) == 3
    assert store._kept[0].saved == ""
    store.idle()  # the rest, at once
    assert len(saved.longest(TEXT).pages) == 12
    assert folder.nbytes == bytes_in(folder) < 1.2 * saved.page_bytes


def test_a_busy_server_writes_what_is_old_a_little_at_a_time(
    tiny, folder, hooked, monkeypatch
):
    store, saved = kept_in(folder, tiny("llama"), [TEXT])
    store.busy()
    assert folder.nbytes == 0
    monkeypatch.setattr(text_writer, "BUSY_AFTER", 0.0)
    monkeypatch.setattr(text_writer, "BUSY_BYTES", 1)
    for pages in 1, 2, 3:
        store.busy()
        assert len(saved.longest(TEXT).pages) == pages


WRITER = f"""
import hashlib, sys
from pathlib import Path
import numpy as np
from mlx_turboquant.conversations.disk import DiskFolder, Record
{inspect.getsource(key)}
{inspect.getsource(record)}
folder = DiskFolder(Path(sys.argv[1]), 10**9)
for i in range(int(sys.argv[2]), 10**6):
    assert folder.write([record(i, 20_000)], behind=b"end")
    print(i, flush=True)
"""


def test_killed_at_any_moment_it_keeps_what_was_written(tmp_path):
    """Two at once, both killed, twice over."""
    chance = random.Random(1)
    written = set()
    for attempt in range(2):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path / "kv"), str(start)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for start in (attempt * 10_000, attempt * 10_000 + 5000)
        ]
        for writer in writers:
            written |= {int(writer.stdout.readline()) for _ in range(6)}
        time.sleep(chance.uniform(0, 0.3))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            written |= {int(i) for i in writer.communicate()[0].split()}
    folder = DiskFolder(tmp_path / "kv", 10**9)
    assert len(written) > 20
    for i in sorted(written):
        assert folder.read([key(i)])[0].tobytes() == whole(record(i, 20_000)), i
    assert folder.nbytes == bytes_in(folder)
    # What was being written is right, or not there.
    for i in {i + 1 for i in written} - written:
        found = folder.read([key(i)])
        assert found is None or found[0].tobytes() == whole(record(i, 20_000))


def test_what_cannot_be_forgotten_is_said(folder, monkeypatch):
    """ "Forgotten" is a promise: a folder that is busy has not been emptied."""
    folder.write([record(1)])
    other = sqlite3.connect(folder.folder / "index.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SpecError, match=r"cannot empty .* end what uses it"):
        folder.forget()
    other.execute("ROLLBACK")
    other.close()
    assert folder.forget() == 1000


def test_the_command_forgets_and_refuses_in_words(tmp_path, run_cli):
    folder = DiskFolder(tmp_path / "kv", 10**6)
    folder.write([record(1)])
    folder.close()
    code, out, _ = run_cli("server", "--kv-dir", str(tmp_path / "kv"), "--forget")
    assert (code, out) == (0, "1.0 kB forgotten\n")
    assert not list((tmp_path / "kv").glob("*.kv"))
    code, _, err = run_cli("server", "--kv-dir", str(tmp_path / "kv"))
    assert code == 2
    assert "--kv-dir keeps codes: add for example --kv-bits 3" in err
    mistyped = str(tmp_path / "vk")
    code, _, err = run_cli("server", "--kv-dir", mistyped, "--forget")
    assert (code, os.path.exists(mistyped)) == (2, False)
    assert f"no kept texts in {mistyped}" in err
    code, _, err = run_cli("server", "--forget")
    assert code == 2
    assert "--forget needs --kv-dir" in err


def test_what_a_folder_does_not_take_is_offered_again(tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    folder = DiskFolder(tmp_path / "kv", 10**7, hourly=0)
    store = prompt_store.PromptStore(folder=folder)
    store.open("m", [model], tq.make_prompt_cache(model, SPEC))
    caches = tq.make_prompt_cache(model, SPEC)
    read(model, caches, TEXT[:300])
    store.insert_cache("m", TEXT[:300].tolist(), caches)
    monkeypatch.setattr(text_writer, "PAGES_AFTER", 0.0)
    store.idle()
    assert folder.nbytes == 0
    folder.hourly = None
    store.idle()
    assert folder.nbytes == 0  # a minute later
    store.close()
    assert bytes_in(folder) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_a_killed_server_s_successor_goes_on(tmp_path, name):
    """Its pages were written; the tail of its text was not, unless nothing is without.

    Of a hybrid's the states at the end of the prompt were, which is long enough.
    """
    path, prompt = agents.save_tiny(name, tmp_path / name), agents.SYSTEM * 6

    def ask(prompt, kill):
        command = [sys.executable, "-m", "mlx_turboquant", "server", "--kv-bits", SPEC]
        command += ["--model", str(path), "--port", "0"]
        command += ["--kv-dir", str(tmp_path / "kv")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment
        )
        line = next(line for line in process.stderr if "Listening on" in line)
        body = json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0})
        url = f"{line.split()[-1]}/v1/completions"
        with urllib.request.urlopen(url, body.encode(), timeout=LIMIT) as got:
            answer = json.load(got)
        if kill:
            folder = DiskFolder(tmp_path / "kv", 10**9)

            def is_idle():
                before = folder.nbytes
                time.sleep(2)
                return 0 < folder.nbytes == before

            until(is_idle)
            folder.close()
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        process.communicate(timeout=LIMIT)
        return answer["choices"][0]["text"], answer["usage"]

    text, usage = ask(prompt, kill=True)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    again, usage = ask(prompt, kill=False)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    most = 1 if name == "hybrid" else 4 + 8 + 2 * 32
    assert 0 < usage["prompt_tokens"] - cached <= most
    assert again == text
    # That one had time to write all.
    again, usage = ask(prompt, kill=True)
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] == 1
    assert again == text
