"""Families whose states stand at one place of a text: kept, gone back to, restored."""

import copy
import logging

import agents
import mlx.core as mx
import numpy as np
import pytest
import support_table
import tiny_models
from serving_tools import options

import mlx_turboquant as tq
from mlx_turboquant.conversations import stops
from mlx_turboquant.conversations.disk import DiskFolder
from mlx_turboquant.conversations.snapshots import CLOSE
from mlx_turboquant.errors import UnsupportedError, UnsupportedModelError
from mlx_turboquant.integrations import server, text_writer
from mlx_turboquant.integrations.kept_text import KeptText
from mlx_turboquant.integrations.prompt_store import PromptStore
from mlx_turboquant.integrations.saved_texts import SavedTexts
from mlx_turboquant.integrations.stock import keeps_all, labelled_leaves
from mlx_turboquant.spec import CacheSpec

#: Small enough for a window of 80 tokens to be compressed.
SPEC = "8,page=32,window=4,sink=2"
#: Recurrent states, chunks, and sliding windows, by what people run.
NAMED = [
    *("falcon_h1", "gemma3_text", "gemma4_text", "gpt_oss", "granitemoehybrid"),
    *("jamba", "lfm2", "llama4", "nemotron_h", "qwen3_5", "qwen3_next"),
    "recurrent_gemma",
]
OTHERS = [
    *("afmoe", "baichuan_m1", "bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3"),
    *("cohere2", "exaone4", "exaone_moe", "gear", "gemma3", "gemma3n", "gemma4"),
    *("iquestloopcoder", "kimi_k3", "kimi_linear", "laguna", "lfm2-vl", "lfm2_moe"),
    *("llama", "longcat_flash_ngram", "mellum", "mimo_v2_flash", "ministral3"),
    *("muse_glimmer", "olmo3", "olmo_hybrid", "plamo2", "plamo3", "qwen3_5_moe"),
    *("spark2_5", "step3p5"),
]
#: No layer of theirs keeps codes of all tokens, which a folder finds texts by.
NOT_SAVED = ("plamo3", "recurrent_gemma")
PARTED = 300

pytestmark = pytest.mark.filterwarnings("ignore:.*caches")


def tokens_of(count, seed):
    made = np.random.default_rng(seed).integers(0, tiny_models.VOCAB, count)
    return made.astype(np.int32)


TEXT = tokens_of(420, 3)
OTHER = np.concatenate([TEXT[:PARTED], tokens_of(100, 4)])


def read(model, caches, tokens):
    logits = model(mx.array(tokens)[None], cache=caches)
    mx.eval(logits, [leaf.state for _, leaf in labelled_leaves(caches)])
    return logits[..., : tiny_models.VOCAB]


def read_to_places(model, tokens, keep=lambda tokens, caches: None):
    """As a server does: what stands at each place is kept."""
    caches, at = model.make_cache(), 0
    for place in stops(len(TEXT), [150, PARTED], 150):
        if place > len(tokens):
            break
        read(model, caches, tokens[at:place])
        keep(tokens[:place], copy.deepcopy(caches))
        at = place
    return caches, at


def keeping_all():
    """Types that are in neither list keep all tokens, or nothing of ours."""
    for name in sorted({*tiny_models.types()} - {*NAMED, *OTHERS}):
        model = tiny_models.build(name)
        try:
            caches = tq.make_prompt_cache(model, SPEC)
        except UnsupportedModelError:
            continue
        yield name, keeps_all(caches)


@pytest.mark.slow
def test_the_lists_have_every_type_that_does_not_keep_all(hooked):
    assert [name for name, keeps in keeping_all() if not keeps] == []
    said = support_table.FILE.read_text()
    assert f"Of {len(NAMED + OTHERS)} types some layer" in said
    assert all(f"`{name}`" in said for name in NOT_SAVED)


@pytest.mark.parametrize(
    "name", [*NAMED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_family_goes_on_from_where_texts_part(name, tmp_path, hooked, caplog):
    """From memory, and from a folder after a restart, as if it had read all anew."""
    caplog.set_level(logging.ERROR)
    model = tiny_models.build(name)
    tq.apply(model, SPEC)
    folder = DiskFolder(tmp_path / "kv", 10**9)
    saved, store = SavedTexts(folder, [model], model.make_cache()), PromptStore()

    def keep(tokens, caches):
        store.insert_cache("m", tokens.tolist(), caches, cache_type="user")
        if len(tokens) == PARTED:
            assert saved.save(tokens, caches, whole=True)  # nothing is left to write
            assert (folder.nbytes > 0) == (name not in NOT_SAVED)

    caches, at = read_to_places(model, TEXT, keep)
    read(model, caches, TEXT[at:])
    store.insert_cache("m", TEXT.tolist(), caches)
    fresh, at = read_to_places(model, OTHER)
    want = read(model, fresh, OTHER[at:])
    fork, rest = store.fetch_nearest_cache("m", OTHER.tolist())
    assert len(rest) == 100
    assert mx.array_equal(read(model, fork, rest), want).item()
    at_once = read(model, model.make_cache(), OTHER)[:, PARTED:]
    error = mx.sqrt(mx.mean((want - at_once) ** 2)) / mx.std(at_once)
    assert error.item() < 0.01
    # What stands at the end of a text cannot go back in it, and says so.
    whole = KeptText("m", TEXT, caches)
    assert (whole.usable(PARTED), whole.usable(len(TEXT))) == (0, len(TEXT))
    with pytest.raises(UnsupportedError, match=r"at token 420 and cannot go back"):
        whole.fork(PARTED)
    folder.close()
    restarted = DiskFolder(tmp_path / "kv", 10**9)
    found = SavedTexts(restarted, [model], model.make_cache()).load(OTHER, least=1)
    if name in NOT_SAVED:
        assert found is None
        return
    tokens, restored = found
    assert tokens.tolist() == TEXT[:PARTED].tolist()
    assert mx.array_equal(read(model, restored, OTHER[PARTED:]), want).item()


class Running:
    """A generator of a saved tiny model, with a folder or without."""

    def __init__(self, path, kv):
        given = options(model=str(path), chat_template=agents.TEMPLATE)
        folder = None if kv is None else DiskFolder(kv, 10**9)
        provider = server.Provider(
            given, CacheSpec.parse("k4v3,page=32,window=8,sink=4")
        )
        store = PromptStore(given.prompt_cache_size, folder=folder)
        self.generator = server.Generator(provider, store)
        self.session = agents.Session(self.generator)

    def close(self):
        self.generator.stop_and_join()


@pytest.mark.parametrize(
    "name",
    [
        "jamba",
        "gpt_oss",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("granitemoehybrid", "lfm2", "nemotron_h", "qwen3_5")
        ),
    ],
)
def test_a_family_s_agent_goes_on_after_a_restart(name, tmp_path, caplog):
    """It reads what is new, and says what it would say having read all of it."""
    caplog.set_level(logging.ERROR)
    path, said = agents.save_tiny(name, tmp_path / name), []
    talk = [{"role": "system", "content": agents.SYSTEM}]
    for text in ("user", agents.TURNS[0][0]), ("tool", agents.TURNS[0][1]):
        talk.append({"role": text[0], "content": text[1]})
        running = Running(path, tmp_path / "kv")
        if said:  # what the first one has seen is not new
            running.session._seen = said[-1]._seen
        answer = running.session.ask(talk)
        said.append(running.session)
        talk.append({"role": "assistant", "content": answer})
        running.close()
    fresh = Running(path, None)
    fresh.session.ask(talk[:-1])
    fresh.close()
    assert fresh.session.texts == said[1].texts
    assert said[1].read[0] <= said[1].new[0] + CLOSE < fresh.session.read[0] / 4


@pytest.mark.parametrize("name", ["falcon_h1", "gemma3_text"])
def test_states_are_written_when_a_server_is_idle(name, tmp_path, hooked, monkeypatch):
    """So that a kill loses none, as long as they are not most of what is written."""
    monkeypatch.setattr(text_writer, "PAGES_AFTER", 0.0)
    model = tiny_models.build(name, max_position_embeddings=4096)
    tq.apply(model, SPEC)
    folder = DiskFolder(tmp_path / "kv", 10**9)
    store = PromptStore(folder=folder)
    store.open("m", [model], model.make_cache())
    saved = store._writer.saved["m"]
    text, caches = tokens_of(1200, 5), model.make_cache()
    for start, stop in (0, 1100), (1100, 1150), (1150, 1200):
        read(model, caches, text[start:stop])  # a window holds its last chunk
        kind = "assistant" if stop == 1200 else "user"
        store.insert_cache("m", text[:stop].tolist(), copy.deepcopy(caches))
        store._kept[-1].kind = kind
    store.idle()  # pages
    assert saved.longest(text) is None
    assert saved.tail_bytes == 0 < saved.page_bytes < folder.nbytes
    store.idle()  # and the end of the last prompt, which is likely to be gone on from
    assert saved.longest(text).length == 1150
    store.idle()  # and of all
    assert saved.longest(text).length == 1200
    assert 0 < saved.tail_bytes <= saved.page_bytes
    written = folder.nbytes
    store.idle()
    assert folder.nbytes == written
    # Turns of a few tokens are not worth as many bytes of states each.
    turns, whole = 20, 0
    for _ in range(turns):
        text = np.concatenate([text, tokens_of(16, 6)])
        read(model, caches, text[-16:])
        store.insert_cache("m", text.tolist(), copy.deepcopy(caches))
        for _ in range(4):
            store.idle()
        whole += saved.longest(text).length == len(text)
        assert saved.tail_bytes <= saved.page_bytes
    assert whole < turns
    store.close()
    assert saved.longest(text).length == len(text)
