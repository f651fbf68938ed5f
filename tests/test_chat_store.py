"""What a chat reads again: nothing, whatever was taken back, restarted or cut short."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from inspect import signature

import agents
import mlx.core as mx
import numpy as np
import pytest
from helpers import MODEL, ROOT
from mlx.utils import tree_flatten
from serving_tools import options
from test_bad_models import run

import mlx_turboquant as tq
from mlx_turboquant.cli import app, kv_folder
from mlx_turboquant.conversations.disk import DiskFolder
from mlx_turboquant.conversations.index import as_tokens, common_length
from mlx_turboquant.conversations.snapshots import CLOSE, EVERY_IN_BEGINNING
from mlx_turboquant.errors import SpecError
from mlx_turboquant.integrations import conversation as module
from mlx_turboquant.integrations import prompt_reading, server
from mlx_turboquant.integrations.fingerprint import fingerprint
from mlx_turboquant.integrations.stock import length_of, stock_caches
from mlx_turboquant.spec import CacheSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")

#: As of models that think: what an answer begins with is cut once it is history.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> "
    "{{ m.content[9:] if m.role == 'assistant' else m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = "Be brief, and say only what you were asked for. " * 10
RULES = SHORT * 3
STORY = "The old man looked at the sea and thought of the years that had gone. " * 6
EXACT, CLOSE_TO_IT, LOSSY = None, "8,window=8,page=32", "k4v3,page=32,window=8"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(model, tokenizer) by name: the bundled one, or one of `agents.MODELS`."""
    loaded = {}

    def get(name):
        if name not in loaded:
            folder = MODEL
            if name != "books":
                folder = agents.save_tiny(name, tmp_path_factory.mktemp("tiny"))
            config = {"chat_template": TEMPLATE}
            get.folders[name] = folder
            loaded[name] = tq.load(str(folder), tokenizer_config=config)
        return loaded[name]

    get.folders = {}
    return get


@pytest.fixture
def make(models, hooked):
    """Makes a chat of a model's."""

    def made(name="books", spec=CLOSE_TO_IT, **options):
        model, tokenizer = models(name)

        def cache():
            if spec is None:
                return stock_caches(model)
            return tq.make_prompt_cache(model, spec)

        return tq.Conversation(model, tokenizer, cache, **options)

    return made


def answer(talk, text, count=10):
    return "".join(r.text for r in talk.say(text, max_tokens=count))


class Counted:
    """Asks a chat, and counts what it read beside what was new."""

    def __init__(self, talk):
        self.talk, self.seen, self.read, self.new = talk, [], [], []

    def ask(self, text, count=10):
        responses = list(self.talk.say(text, max_tokens=count))
        length = responses[-1].prompt_tokens + self.talk.cached_tokens
        prompt = as_tokens(self.talk._text_tokens[:length])
        common = max((common_length(prompt, one) for one in self.seen), default=0)
        self.read.append(responses[-1].prompt_tokens)
        self.new.append(max(1, length - common))
        self.seen.append(as_tokens(self.talk._text_tokens))
        return "".join(r.text for r in responses)


def afresh(make, talk, text, *kind):
    """What a chat answers that has read nothing, and has the same messages."""
    fresh = make(*kind)
    fresh.messages = [dict(message) for message in talk.messages]
    said = answer(fresh, text)
    assert fresh.cached_tokens == 0
    return said


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("books", EXACT),
        ("books", CLOSE_TO_IT),
        ("hybrid", CLOSE_TO_IT),
        ("sliding window", CLOSE_TO_IT),
        pytest.param("hybrid (mamba)", CLOSE_TO_IT, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_read_twice_and_answers_are_as_if_all_were(make, name, spec):
    """Turns, one taken back, another system prompt, a chat started over."""
    kind = name, spec
    rules = SHORT if name == "books" else RULES
    talk = make(*kind, system=rules, store=tq.PromptStore())
    counted = Counted(talk)
    counted.ask(STORY)
    for text in ("And then?", "Why was that?"):
        expected = afresh(make, talk, text, *kind)
        assert counted.ask(text) == expected
    before = [dict(message) for message in talk.messages[:-2]]
    assert talk.undo() == "Why was that?"
    assert talk.messages == before
    assert talk.tokens == length_of(talk.cache) <= len(talk._text_tokens)
    expected = afresh(make, talk, "Who was it?", *kind)
    assert counted.ask("Who was it?") == expected
    talk.change_system(rules + "Be kind.")
    if name == "books":
        # What it will go on from is known at once.
        assert talk.tokens < len(counted.seen[-1]) - counted.new[0] / 2
    expected = afresh(make, talk, "And at last?", *kind)
    assert counted.ask("And at last?") == expected
    talk.reset()
    assert talk.tokens == 0
    expected = afresh(make, talk, "Another tale.", *kind)
    assert counted.ask("Another tale.") == expected
    # The first is all read, and what stands behind the changed system prompt.
    assert len(counted.read) == 6
    assert max(counted.new[1:4]) < 50 < 100 < counted.new[4]
    if name == "books":
        assert counted.read == counted.new
    again = [read - new for read, new in zip(counted.read, counted.new, strict=True)]
    assert min(again) >= 0
    # Within the system prompt, states are kept every so many tokens.
    assert again.pop(4) < EVERY_IN_BEGINNING
    assert max(again) < CLOSE + 10


def test_a_chat_that_its_store_cannot_hold_goes_on_all_the_same(make):
    talk = make(store=tq.PromptStore(max_bytes=1))
    answer(talk, STORY)
    assert len(talk.store._kept) == 0
    expected = afresh(make, talk, "And then?")
    assert answer(talk, "And then?") == expected
    assert talk.cached_tokens > 100


def test_chats_of_one_store_find_each_other_s_beginnings(make):
    store = tq.PromptStore()
    first, second = (make(system=SHORT, store=store) for _ in range(2))
    answer(first, "Who is there?")
    said = answer(second, "Nobody at all.")
    assert second.cached_tokens > 100
    assert said == afresh(make, make(system=SHORT), "Nobody at all.")
    other = make(spec=LOSSY, system=SHORT, store=store)
    answer(other, "Nobody at all.")
    assert other.cached_tokens == 0


def test_states_without_a_length_have_seen_the_answer_s_last_token(make):
    """Only recurrent layers: nothing says how many tokens a state has seen."""
    name = "recurrent"
    agents.MODELS[name] = ("mamba2", {})
    try:
        talk, fresh = make(name, None), make(name, None)
    finally:
        del agents.MODELS[name]
    talk.tokenizer = fresh.tokenizer = tq.load(str(MODEL))[1]  # without a template
    assert length_of(talk.cache) is None
    answer(talk, STORY)
    count = len(talk._text_tokens)
    said = answer(talk, " And then?")
    assert talk.cached_tokens == count
    text = talk._text_tokens[:-10]
    fresh._encode = lambda messages, new: text
    assert answer(fresh, "") == said
    assert fresh.cached_tokens == 0


# Without a template.


def test_a_turn_is_taken_back_without_a_template(make, tmp_path):
    talk = make(system="A tale.")
    talk.tokenizer = tq.load(str(MODEL))[1]
    with pytest.raises(SpecError, match="no turn to take back"):
        talk.undo()
    answer(talk, STORY)
    text = list(talk._text_tokens)
    said = answer(talk, " He said")
    assert talk.undo() == " He said"
    assert talk._text_tokens == text
    assert answer(talk, " He said") == said
    with pytest.raises(SpecError, match=r"text's beginning, which is written; /reset"):
        talk.change_system("Another.")
    talk.save(tmp_path / "chat")
    talk.load(tmp_path / "chat")
    with pytest.raises(SpecError, match=r"where the last turn begins is not kept"):
        talk.undo()
    talk.reset()
    talk.change_system("Another.")
    answer(talk, STORY)
    assert talk.tokenizer.decode(talk._text_tokens).startswith("Another.\n" + STORY)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Another."}]


# Turns that end too early.


class Failing:
    """A model that raises at its n-th call."""

    def __init__(self, network, calls, error):
        self._network, self._calls, self._error = network, calls, error

    def __getattr__(self, name):
        return getattr(self._network, name)

    def __call__(self, *args, **options):
        self._calls -= 1
        out = self._network(*args, **options)
        if self._calls == 0:
            raise self._error
        return out


def state_of(talk):
    leaves = tree_flatten([cache.state for cache in talk.cache])
    arrays = [np.array(a).tobytes() for _, a in leaves if isinstance(a, mx.array)]
    held = talk._text_tokens[: talk.tokens]
    return json.dumps(talk.messages), list(talk._text_tokens), held, arrays


@pytest.mark.parametrize("name", ["books", "hybrid"])
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("calls", [1, 6])
def test_a_turn_that_fails_changes_nothing(make, name, error, calls):
    """While it is read, or once some of its answer was said."""
    talk, same = make(name, LOSSY), make(name, LOSSY)
    for one in (talk, same):
        answer(one, STORY)
    before, network = state_of(talk), talk.network
    talk.network = talk._stepping = Failing(network, calls, error)
    said = ""
    responses = talk.say("And then? " + SHORT, max_tokens=20)
    with pytest.raises(type(error)):  # noqa: PT012
        for response in responses:
            said += response.text
    talk.network = talk._stepping = network
    if isinstance(error, KeyboardInterrupt) and said:
        # Ctrl-C keeps what came, but not a cache that may be ahead of it.
        assert talk.messages[-1] == {"role": "assistant", "content": said}
        assert talk.tokens < len(talk._text_tokens)
    else:
        assert state_of(talk) == before
        assert talk._turns == [0]
    expected = answer(same, "And then? " + SHORT)
    if len(talk.messages) == 4:
        talk.undo()
    assert answer(talk, "And then? " + SHORT) == expected
    if calls == 6:
        assert talk.cached_tokens > 200  # what was read before it is not lost


def test_of_a_long_text_whose_reading_is_stopped_the_pieces_stay(make, monkeypatch):
    monkeypatch.setattr(prompt_reading, "_PIECE", 64)
    talk = make("books", EXACT)
    network, talk.network = talk.network, Failing(talk.network, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answer(talk, STORY * 2)
    assert talk.messages == []
    talk.network = network
    expected = afresh(make, talk, STORY * 2, "books", EXACT)
    assert answer(talk, STORY * 2) == expected
    assert talk.cached_tokens == 128


def test_a_chat_that_fails_says_so_and_goes_on(monkeypatch, run_chat):
    real, turns = module.stream_generate, []

    def failing(*args, **options):
        turns.append(1)
        if len(turns) == 2:
            raise RuntimeError("no\nmemory")
        if len(turns) == 3:
            raise KeyboardInterrupt
        yield from real(*args, **options)

    monkeypatch.setattr(module, "stream_generate", failing)
    code, out = run_chat("Once upon a time", "there", "was", "a king", "/undo", "/q")
    assert code == 0
    assert "error: the answer failed (RuntimeError: no); the turn is not kept" in out
    assert "stopped before the answer began; the turn is not kept" in out
    meters = [int(n) for n in re.findall(r"^(\d+) / 8192 tokens, ", out, re.M)]
    assert 0 < meters[1] == meters[2] == meters[3] < meters[4]
    assert meters[5] == meters[1]
    assert "taken back: a king" in out


@pytest.fixture
def run_chat(hooked):
    def typed(*lines, **options):
        given = [word for pair in options.items() for word in pair]
        return run("chat", "--model", str(MODEL), "-m", "8", *given,
                   stdin="\n".join(lines))  # fmt: skip

    return typed


# Restarts.


@pytest.mark.parametrize("name", ["books", "hybrid"])
def test_a_restart_changes_no_answer(make, tmp_path, name):
    """The same turns again: beside a chat that was only started over."""
    said, read = [], []

    def chat(restarts):
        folder = DiskFolder(tmp_path / "kv", 10**9) if restarts else None
        store = tq.PromptStore(folder=folder)
        return make(name, CLOSE_TO_IT, system=RULES, store=store)

    for restarts in (False, True):
        talk = chat(restarts)
        counted = Counted(talk)
        for text in (STORY, "And then?", "At last?"):
            counted.ask(text)
        history = [dict(message) for message in talk.messages]
        if restarts:
            talk.store.close()
            counted.talk = talk = chat(restarts)
        talk.messages = history
        again = [counted.ask("So?")]
        talk.reset()
        again += [counted.ask(text) for text in (STORY, "Well?")]
        said.append(again)
        read.append(counted.read[3:])
        assert counted.read[3] <= counted.new[3] + CLOSE
        talk.store.close()
    assert said[0] == said[1]
    if name == "books":
        # Pages go by the text; what was in memory could be cut anywhere.
        assert all(a <= b <= a + 32 for a, b in zip(*read, strict=True))
    else:
        # Of its states, those of the system prompt and of the last turn outlive it.
        assert read[0][0] == read[1][0]
        assert read[1][1] < 150


def test_a_chat_that_is_killed_loses_a_turn_and_one_that_is_ended_none(
    tmp_path, run_chat
):
    story = "".join(f"{i} men went to sea in {i + 7} boats. " for i in range(30))

    def options(name):
        return {"--kv-bits": LOSSY, "--kv-dir": str(tmp_path / name)}

    def talk(name, is_killed):
        """Two turns, the second not yet over if it is killed."""
        words = [word for pair in options(name).items() for word in pair]
        command = [sys.executable, "-u", "-m", "mlx_turboquant", "chat", "-m", "2000"]
        process = subprocess.Popen(
            [*command, "--model", str(MODEL), *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        out = b""
        for turn, text in enumerate((story, "And then?"), 1):
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            while out.count(b">>> ") < turn or out.endswith(b">>> "):
                out += os.read(process.stdout.fileno(), 1)  # until it answers
            if is_killed and turn == 2:
                break
            process.send_signal(signal.SIGINT)
            while out.count(b">>> ") < turn + 1:
                out += os.read(process.stdout.fileno(), 1)
        number = signal.SIGKILL if is_killed else signal.SIGTERM
        process.send_signal(number)
        process.wait(60)
        process.stdin.close()
        process.stdout.close()
        assert process.returncode == (-number if is_killed else 128 + number)
        assert out.count(b"written at") == 2 - is_killed
        with sqlite3.connect(tmp_path / name / "index.sqlite") as index:
            count = "SELECT count(*) FROM records WHERE kind=3"  # ends of texts
            ends = index.execute(count).fetchone()[0]
        index.close()
        return ends

    assert talk("killed", is_killed=True) == 0
    assert talk("ended", is_killed=False) == 1
    out = run_chat(story, **options("killed"))[1]
    reused, read = re.search(r"(\d+) tokens reused, (\d+) read", out).groups()
    assert int(reused) > 300
    assert int(read) <= 32


def test_a_server_finds_what_a_chat_has_written(models, make):
    """Its caches are made another way."""
    models("llama")
    given = options(model=str(models.folders["llama"]))
    provider = server.Provider(given, CacheSpec.parse(LOSSY))
    provider.load_default()
    key = fingerprint([provider.model], provider.empty_caches)
    assert key == make("llama", LOSSY)._own_key
    assert key != make("llama", CLOSE_TO_IT)._own_key


def test_another_system_prompt_and_the_first_again(make):
    """Each text stays for the other."""
    counted = Counted(make("books", EXACT, system=SHORT, store=tq.PromptStore()))
    counted.ask(STORY)
    counted.talk.change_system("Be kind. " + SHORT)
    counted.ask("And then?")
    counted.talk.change_system(SHORT)
    counted.ask("And then?")
    assert counted.read == counted.new
    assert counted.read[2] < 50 < 200 < counted.read[1]


def test_what_is_written_between_turns(make, tmp_path):
    """Pages at once, the rest at the end; once each."""
    folder = DiskFolder(tmp_path / "kv", 10**9)
    talk = make("books", LOSSY, store=tq.PromptStore(max_size=1, folder=folder))
    talk.store.write()  # there is nothing yet
    answer(talk, STORY * 2)
    assert folder.nbytes == 0
    talk.store.write()
    first = folder.nbytes
    assert first > 0
    assert talk.store._kept[0].saved == "pages"
    answer(talk, STORY)
    talk.store.write()
    second = folder.nbytes
    assert talk.store._kept[0].saved == "pages"
    assert 1.3 * first < second < 1.6 * first
    answer(talk, "So?", count=2)
    talk.store.write()
    assert folder.nbytes <= second + (second - first) / 3
    talk.store.close()
    assert folder.nbytes > second + (second - first) / 3  # its tail
    assert talk.store._kept[0].saved == "all"


def test_a_file_of_other_bits_stays_out_of_the_folder(make, tmp_path):
    other = make("books", CLOSE_TO_IT)
    answer(other, STORY)
    other.save(tmp_path / "chat")
    folder = DiskFolder(tmp_path / "kv", 10**9)
    talk = make("books", LOSSY, store=tq.PromptStore(folder=folder))
    assert talk.has_own_bits
    talk.load(tmp_path / "chat")
    assert not talk.has_own_bits
    assert answer(talk, "And then?") == answer(other, "And then?")
    assert talk.cache[0].spec.keys.bits == 8
    talk.store.write()
    assert folder.nbytes == 0
    talk.reset()
    assert talk.has_own_bits
    answer(talk, STORY)
    assert talk.cached_tokens == 0
    assert talk.cache[0].spec.keys.bits == 4
    talk.store.write()
    assert folder.nbytes > 0
    talk.store.close()


def test_a_file_of_other_bits_that_cannot_go_back_is_read_again(make, tmp_path):
    """Its states stand behind thinking that the template cuts."""
    other = make("hybrid", CLOSE_TO_IT)
    answer(other, STORY)
    other.save(tmp_path / "chat")
    talk = make("hybrid", LOSSY)
    talk.load(tmp_path / "chat")
    before = state_of(talk)
    talk.network = Failing(talk.network, 1, RuntimeError())
    with pytest.raises(RuntimeError):
        answer(talk, "And then?")
    assert state_of(talk) == before
    assert not talk.has_own_bits
    talk.network = talk.network._network
    expected = afresh(make, talk, "And then?", "hybrid", LOSSY)
    assert answer(talk, "And then?") == expected
    assert talk.has_own_bits


# The command line.


def test_one_place_says_what_a_folder_is():
    names = ("kv_dir", "kv_disk", "kv_disk_hourly", "forget")
    chat, server = (signature(app.COMMANDS[n]).parameters for n in ("chat", "server"))
    for name in names:
        assert chat[name] == server[name]
    assert chat["kv_disk"].default == kv_folder.DISK


REFUSED = {
    "empty": (["--kv-dir", ""], "--kv-dir is empty; name a folder, . for this one"),
    "blank": (["--kv-dir", " "], "--kv-dir is empty; name a folder"),
    "empty forget": (["--kv-dir", "", "--forget"], "--kv-dir is empty"),
    "no bits": (["--kv-dir", "kv"], "--kv-dir keeps codes: add for example --kv-bits"),
    "bounded": (
        ["--kv-dir", "kv", "--kv-bits", "3", "--max-kv-size", "512"],
        "--kv-dir keeps whole texts, --max-kv-size 512 drops what is older; leave one",
    ),
    "nobody": (
        ["--kv-dir", "~no_such_user/kv", "--kv-bits", "3"],
        "~no_such_user/kv begins with the home of nobody here",
    ),
    "forget": (["--forget"], "--forget needs --kv-dir"),
    "size": (["--kv-dir", "kv", "--kv-bits", "3", "--kv-disk", "x"], "'x' is no size"),
}


@pytest.mark.parametrize("command", ["chat", "server"])
@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_are_none_are_one_line(case, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, says = REFUSED[case]
    code, out = run(command, "--model", str(MODEL), *args)
    assert code == 2
    assert out.count("error: ") == 1
    assert says in out
    assert os.listdir(tmp_path) == []


def test_the_command_reuses_and_forgets(tmp_path, run_chat):
    long = STORY * 3
    options = {"--kv-bits": LOSSY, "--kv-dir": str(tmp_path / "kv")}
    code, out = run_chat(long, "r", long, "/stats", "/save", "q", "never", **options)
    assert code == 0
    (first, read), (again, rest) = re.findall(r"(\d+) tokens reused, (\d+) read", out)
    assert (first, again) == ("0", str(int(read) - 1))
    assert rest == "1"
    assert "started over" in out
    assert "with what is kept to go back to: " in out
    assert "never" not in out
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    code, out = run_chat(long, "/stats", **options)
    reused, rest = map(int, re.findall(r"(\d+) tokens reused, (\d+) read", out)[0])
    assert (reused + rest, rest <= 32) == (int(read), True)
    code, out = run_chat(**options, **{"--forget": ""})
    assert code == 2
    code, out = run("chat", "--kv-dir", str(tmp_path / "kv"), "--forget")
    assert code == 0
    assert re.fullmatch(r"[\d.]+ [kM]B forgotten\n", out)
    assert not list((tmp_path / "kv").glob("*.kv"))


def test_options_that_a_prompt_cache_file_decides(tmp_path, hooked):
    def ask(*args):
        file = ["--prompt-cache-file", str(tmp_path / "book"), *args]
        code, out = run("generate", "--model", str(MODEL), "-m", "1", "-p", "So", *file)
        return code, out.partition("error: ")[2]

    for bits, size in (("3", ()), ("3", ("--max-kv-size", "600"))):
        args = ["--model", str(MODEL), "--kv-bits", bits, *size, "-p", STORY]
        file = ["--prompt-cache-file", str(tmp_path / "book")]
        assert run("cache_prompt", *args, *file)[0] == 0
        assert ask()[0] == 0
        assert ask("--kv-bits", "3")[0] == 0
        code, line = ask("--kv-bits", "auto")
        assert code == 2
        assert "asks for auto" in line
        assert "but the prompt cache holds k3v3; leave --kv-bits out" in line
        code, line = ask("--max-kv-size", "600")
        assert code == (0 if size else 2)
        assert size or "--max-kv-size 600 is for a new cache" in line
        code, line = ask("--max-kv-size", "700")
        assert code == 2
        assert "(mlx_tq.cache_prompt --max-kv-size 700)" in line
