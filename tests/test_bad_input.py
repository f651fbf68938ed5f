"""What users type, pipe and point at that is none: one line and exit code 2."""

import json
import os
import subprocess
import sys

import pytest
import tiny_folder
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_models import run

import mlx_turboquant as tq
from mlx_turboquant.cli import options
from mlx_turboquant.errors import SpecError, UnsupportedModelError
from mlx_turboquant.evals import EvalPlan
from mlx_turboquant.integrations import chat_template, model_identity

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The same with a chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "chat_template": tiny_folder.TEMPLATE,
    }
    folder = tmp_path_factory.mktemp("chatty")
    return tiny_folder.write(folder, tokenizer_config=config)


def ends(code, out):
    """The one error line; or "" if it went well."""
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    if code == 0:
        assert not errors
        return ""
    assert code == 2, out
    if "Usage:" in out:  # typer's, of a value outside an option's limits
        return "usage"
    assert len(errors) == 1, out
    return errors[0]


# Text.

ENCODED = {
    "binary": (bytes(range(256)), "byte 0x80 at character 128"),
    "latin1": ("café".encode("latin-1"), "iconv -f latin1"),
    "utf-16": ("hello".encode("utf-16"), "iconv -f utf-16"),
    "cut": ("é".encode()[:1], "byte 0xc3"),
}


def piped(args, stdin, env=None):
    """A real process, its stdin and stdout in bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_turboquant", *args],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("case", ENCODED)
def test_stdin_that_is_not_utf8_is_named(case, model):
    data, says = ENCODED[case]
    for command in ("generate", "cache_prompt"):
        args = [command, "--model", str(model), "-p", "-"]
        if command == "cache_prompt":
            args += ["--prompt-cache-file", str(model / "c")]
        line = ends(*run(*args, stdin=data))
        assert "stdin is not UTF-8" in line
        assert says in line


@settings(max_examples=60)
@given(data=st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(data, model):
    line = ends(
        *run("generate", "--model", str(model), "-m", "1", "-p", "-", stdin=data)
    )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        assert "stdin is not UTF-8" in line
    else:
        empty = not text.removeprefix("\ufeff").strip()
        assert ("empty" in line or "no tokens" in line) if empty else line == ""


@settings(max_examples=30)
@given(data=st.binary(max_size=60))
def test_a_chat_reads_any_bytes(data, model):
    code, out = run("chat", "--model", str(model), "-m", "1", stdin=data + b"\n/quit\n")
    assert code == 0, out
    for line in out.splitlines():
        assert "Traceback" not in line


def test_a_locale_without_utf8_changes_nothing(model):
    args = ["generate", "--model", str(model), "-m", "1", "-p", "-", "--verbose", "F"]
    bare = {
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    code, out, err = piped(args, "hello é".encode(), bare)
    assert code == 0, err
    assert out == piped(args, "hello é".encode())[1]


def closed(number):
    return lambda: os.close(number)


def test_closed_streams_and_a_full_disk_end_in_a_line(model):
    """MLX cannot open a file that is given number 0."""
    base = [sys.executable, "-m", "mlx_turboquant", "generate", "--model", str(model)]

    def ended(args, **streams):
        done = subprocess.run(
            [*base, "-m", "1", *args], cwd=ROOT, stderr=subprocess.PIPE, **streams
        )
        return done.returncode, done.stderr.decode()

    out = subprocess.PIPE
    code, err = ended(["-p", "hello"], stdout=out, preexec_fn=closed(0))
    assert code == 0, err
    code, err = ended(["-p", "-"], stdout=out, preexec_fn=closed(0))
    assert (code, "error: stdin is closed" in err) == (2, True)
    code, err = ended(["-p", "hello"], preexec_fn=closed(1))
    assert code == 0, err
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            code, err = ended(["-p", "hello"], stdout=full)
        assert code == 2
        assert "error: cannot write the output (No space left" in err
        assert "Traceback" not in err


def test_arguments_that_are_not_utf8_are_named(model):
    for option in ("-p", "--system-prompt", "--prefill-response", "--extra-eos-token"):
        line = ends(
            *run("generate", "--model", str(model), "-m", "1", option, "\udce9")
        )
        assert "is not UTF-8 (byte 0xe9 at character 0)" in line


# Chat templates.

WRAPPED = {
    "plain": "{% for m in messages %}[{{ m.content }}]{% endfor %}",
    "strips": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
    "upper": "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}",
    "asks": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
}


class Templated:
    """A tokenizer that has a template and nothing else."""

    def __init__(self, template):
        from jinja2 import Template

        self.template = Template(template)

    def apply_chat_template(self, messages, tokenize, **options):
        assert tokenize is False
        return self.template.render(messages=messages, **options)


@given(
    case=st.sampled_from([*WRAPPED]),
    text=st.text(max_size=12).filter(str.strip),
    spaces=st.sampled_from(["", " ", "\n", "\n\n "]),
)
def test_a_turn_is_its_opening_text_and_end(case, text, spaces):
    """Leading spaces and newlines, which templates strip, are no matter."""
    tokenizer = Templated(WRAPPED[case])
    turn = [{"role": "user", "content": spaces + text + spaces}]
    whole = chat_template.render(tokenizer, turn, {}, answers=False)
    begun = chat_template.render_open(tokenizer, turn, {})
    end = "</s>" if case == "asks" else "]"
    assert whole == begun + end
    rest = chat_template.render_from(tokenizer, turn, 0, {})
    assert (begun + rest).startswith(begun)
    opening = "<user>" if case == "asks" else "["
    assert chat_template.render(tokenizer, turn, {}) == opening + rest


def test_a_template_without_the_text_is_refused():
    with pytest.raises(SpecError, match="leaves out what the user says"):
        chat_template.render_open(
            Templated("hello"), [{"role": "user", "content": "x"}], {}
        )


def test_a_cached_prompt_with_a_leading_newline_goes_on(chatty, tmp_path):
    file = str(tmp_path / "c")
    common = ["--model", str(chatty), "--prompt-cache-file", file]
    assert ends(*run("cache_prompt", *common, "-p", "\n hello there")) == ""
    assert ends(*run("generate", *common, "-m", "2", "-p", " \nworld")) == ""
    line = ends(*run("generate", *common, "-p", "x", "--chat-template-config", "[1]"))
    assert "is not a JSON object" in line


SET_BY_COMMANDS = ["tokenize", "add_generation_prompt", "return_dict", "chat_template"]


@pytest.mark.parametrize("name", SET_BY_COMMANDS)
def test_options_that_commands_decide_are_refused(name, chatty):
    config = json.dumps({name: True})
    for command in ("generate", "chat"):
        line = ends(
            *run(command, "--model", str(chatty), "--chat-template-config", config)
        )
        assert f"sets {name}" in line


# Flags.

#: Options of ``generate`` that take a number.
NUMBERS = (
    *("--max-tokens", "--top-k", "--min-tokens-to-keep", "--seed", "--max-kv-size"),
    *("--prefill-step-size", "--num-draft-tokens", "--temp", "--top-p", "--min-p"),
    *("--xtc-probability", "--xtc-threshold", "--kv-bits", "--extra-eos-token"),
)
ODD = st.one_of(
    st.sampled_from(["-1", "0", "1", "2", "31", "32", "1e9", "nan", "inf", "", "x"]),
    st.sampled_from(["9" * 25, "9" * 5000, "-0.5", "0.5", str(2**31), str(2**64 - 1)]),
    st.sampled_from(["k9v9", "k" + "9" * 400 + "v3", "3,page=" + "9" * 5000, "auto"]),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=4),
)


@settings(max_examples=120)
@given(option=st.sampled_from(NUMBERS), value=ODD)
def test_any_number_runs_or_is_refused(option, value, model):
    args = ["generate", "--model", str(model), "-p", "hello there", "--temp", "1"]
    limit = [] if option == "--max-tokens" else ["-m", "2"]
    ends(*run(*args, *limit, f"{option}={value}"))


def test_the_context_ends_a_text(model):
    """Its numbers say 128; who asks for more is told."""
    args = ["generate", "--model", str(model), "-p", "hello there world"]
    code, out = run(*args, "-m", "2147483647")
    assert code == 0
    assert "Generation: 125 tokens" in out
    assert "stopped at the end of the context, 128" in out
    assert "stopped" not in run(*args, "-m", "125")[1]
    line = ends(*run(*args[:-1], "hello " * 129))
    assert "has 129 tokens, the model's context is 128" in line


@given(text=st.text(max_size=8) | ODD | st.from_regex(r"-?[0-9.]{1,9} ?[KMGT]?B?"))
def test_any_size_is_bytes_or_refused(text):
    try:
        size = options.size("--memory", text)
    except SpecError as error:
        size = len(str(error))
    assert 0 <= size <= 10**18
    with pytest.raises(SpecError):
        options.size("--memory", "0", least=1)


@given(
    name=st.sampled_from(["windows", "seeds", "scored", "stepped", "greedy", "depths"]),
    value=st.sampled_from([-(10**30), -1, 10**7, 10**30]),
)
def test_plans_have_limits(name, value):
    with pytest.raises(SpecError, match=f"{name} {value} is outside"):
        EvalPlan(**{name: value})


def test_options_of_mlx_lms_quantization_say_what_takes_their_place(model):
    for command in ("generate", "cache_prompt"):
        file = ["--prompt-cache-file", "x"] if command == "cache_prompt" else []
        args = [command, "--model", str(model), "-p", "hello", *file]
        line = ends(*run(*args, "--kv-group-size", "64"))
        assert "one scale" in line
        line = ends(*run(*args, "--quantized-kv-start", "5000"))
        assert "window=" in line


def test_the_default_chat_template(model, chatty):
    args = ["-m", "1", "-p", "hello", "--use-default-chat-template"]
    line = ends(*run("generate", "--model", str(model), *args))
    assert "neither this tokenizer nor its class has a chat template" in line
    said = run("generate", "--model", str(chatty), *args)
    assert ends(*said) == ""
    assert "Prompt: 4 tokens" in said[1]  # <user> hello <end> say: its own template
    server = ("server", "--use-default-chat-template", "--port", "0")
    assert line == ends(*run(*server, "--model", str(model)))


def test_a_class_with_a_chat_template_gives_it_to_tokenizers_without(model):
    _, tokenizer = tq.load(str(model))
    type(tokenizer._tokenizer).default_chat_template = tiny_folder.TEMPLATE
    try:
        chat_template.use_default(tokenizer)
    finally:
        del type(tokenizer._tokenizer).default_chat_template
    chat = [{"role": "user", "content": "hello"}]
    assert chat_template.render(tokenizer, chat, {}) == "<user> hello <end> say "


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--extra-eos-token", "nosuch", "'nosuch' is no token of this model"),
        ("--extra-eos-token", "32", "or its number, 0..31"),
        ("--extra-eos-token", "-1", "is no token of this model"),
        ("--top-k", "32", "--top-k 32 is above 31: the model has 32 tokens"),
        ("--min-tokens-to-keep", "33", "is above 32"),
        ("--prompt-cache-file", "", "cannot read a prompt cache from"),
        ("--prompt-cache-file", "/", "names no file"),
        ("--seed", "-1", "usage"),
        ("--temp", "inf", "usage"),
        ("--temp", "nan", "usage"),
    ],
)
def test_each_of_them_says_what_it_may_be(option, value, says, model):
    line = ends(*run("generate", "--model", str(model), "-m", "1", option, value))
    assert says in line


@pytest.mark.parametrize("command", ["generate", "plan", "chat", "server", "eval"])
def test_an_empty_name_is_not_the_default_model(command):
    assert "(its name is empty)" in ends(*run(command, "--model", ""))


def test_no_length_to_score_at_is_said(model):
    line = ends(*run("eval", "--model", str(model), "--lengths", "0"))
    assert "there is no length to score at" in line


def test_an_endless_number_is_not_repeated():
    for value in (10**400, 10**5000, -(10**400), "9" * 5000):
        with pytest.raises(SpecError) as caught:
            tq.CacheSpec.parse(value)
        assert "use 1..8" in str(caught.value)
        assert len(str(caught.value)) < 300
    with pytest.raises(SpecError) as caught:
        EvalPlan(windows=10**400)
    assert len(str(caught.value)) < 300


# What is no model.


def test_what_is_no_model_is_said_in_words(model, tmp_path):
    network, tokenizer = tq.load(str(model))
    cache = tq.make_prompt_cache(network, 3)
    tq.save_prompt_cache(tmp_path / "c", cache)
    for other in ((network, tokenizer), tokenizer, str(model), None, 3):
        uses = [
            lambda it: tq.make_prompt_cache(it, 3),
            lambda it: tq.apply(it, 3),
            tq.compiled,
            lambda it: tq.evaluate(it, tokenizer, [3]),
        ]
        if other is not None:
            uses.append(lambda it: tq.load_prompt_cache(tmp_path / "c", it))
        for use in uses:
            with pytest.raises(UnsupportedModelError, match="pass the model alone"):
                use(other)


@pytest.mark.parametrize("name", [None, 3, b"x", ["x"], ""])
def test_a_models_name_is_a_text(name):
    for read in (tq.load, tq.footprint):
        with pytest.raises(UnsupportedModelError, match=r"name is (of type|empty)"):
            read(name)


# Paths.


def test_an_output_that_cannot_be_is_said_before_the_work(model, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in ("/nowhere/x", str(tmp_path / "file" / "x"), "", "x" * 300):
        args = ["--model", str(model), "-p", "hello", "--prompt-cache-file", path]
        line = ends(*run("cache_prompt", *args))
        assert "cannot write a prompt cache to" in line
    tiny = ["--lengths", "60", "--windows", "1", "--needles", "0", "--greedy", "0"]
    tiny += ["--scored", "4", "--stepped", "2", "--no-baselines"]
    tiny = ["eval", "3", "--model", str(model), *tiny]
    line = ends(*run(*tiny, "--out", str(tmp_path / "file")))
    assert f"cannot make the folder {tmp_path / 'file'} (File exists)" in line
    (tmp_path / "empty").write_text("")
    out = str(tmp_path / "out")
    line = ends(*run(*tiny, "--text", str(tmp_path / "empty"), "--out", out))
    assert "there is no text in" in line


def test_a_chat_goes_on_behind_a_path_that_is_none(model, tmp_path):
    lines = ["/save /nowhere/x", "/load /", "/save /", f"/load {'x' * 300}", "hello"]
    code, out = run("chat", "--model", str(model), "-m", "1", stdin="\n".join(lines))
    assert code == 0
    assert out.count("error: cannot ") == 4
    assert "written at" in out


def test_a_model_is_itself_by_whatever_path(model, tmp_path, monkeypatch):
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (copied / file.name).write_bytes(file.read_bytes())
    file = str(tmp_path / "c")
    args = ["--prompt-cache-file", file, "-p", "hello"]
    assert ends(*run("cache_prompt", "--model", str(model), *args)) == ""
    monkeypatch.chdir(model.parent)
    for name in (f"{model}/", f"./{model.name}", str(copied)):
        assert ends(*run("generate", "--model", name, *args, "-m", "1")) == ""
    weights = (copied / "model.safetensors").read_bytes()
    for place in (-1, len(weights) // 2):  # another model's weights
        changed = bytearray(weights)
        changed[place - 2000 : place] = b"\x31" * 2000
        (copied / "model.safetensors").write_bytes(changed)
        model_identity.identity_of.cache_clear()
        line = ends(*run("generate", "--model", str(copied), *args, "-m", "1"))
        assert f"was made with model {str(model)!r}, not {str(copied)!r}" in line


def test_files_of_mlx_lms_say_no_more_than_a_name(model, tmp_path):
    is_same, other = model_identity.is_same, tmp_path / "other"
    assert is_same({"model": str(model)}, f"{model}/")
    assert is_same({}, str(model))
    assert not is_same({"model": "no/such-model"}, str(model))
    assert not is_same({"model": str(other)}, str(model))
    assert model_identity.identity_of(str(other)) is None
    other.mkdir()
    assert model_identity.identity_of(str(other)) is None


# Chats on disk.

CHATS = {
    "messages": [
        "[1]",
        "null",
        "{",
        '[{"role": "user"}]',
        '[{"role": 1, "content": ""}]',
    ],
    "held": ["[1.5]", "[true]", "{}", "[99999]", "[]", "[-1]"],
    "tokens": ["[99999]", '["a"]', "[]", "null"],
    "model": ["no/such-model"],
    "kind": ["a book"],
}


def test_chats_that_are_none_are_refused_and_the_chat_goes_on(model, tmp_path):
    lines = ["hello there", f"/save {tmp_path / 'chat'}", "/quit"]
    assert run("chat", "--model", str(model), "-m", "2", stdin="\n".join(lines))[0] == 0
    cache, metadata = tq.load_prompt_cache(tmp_path / "chat", return_metadata=True)
    names = []
    for field, values in CHATS.items():
        for number, value in enumerate(values):
            changed = {**metadata, field: value}
            if field == "model":
                del changed[model_identity.KEY]
            names.append(tmp_path / f"{field}{number}")
            tq.save_prompt_cache(names[-1], cache, changed)
    lines = [f"/load {name}" for name in [*names, tmp_path / "chat"]]
    code, out = run("chat", "--model", str(model), "-m", "2", stdin="\n".join(lines))
    assert code == 0
    assert out.count("error: ") == len(names)
    assert out.count(">>> loaded ") == 1
