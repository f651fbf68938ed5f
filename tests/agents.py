"""An agent's session, written by hand, and how it is put to a server's generator.

Thirty requests of a coding agent: tools whose results go on from the answer, thinking
that the template cuts when the user speaks again, a header line in the system prompt
that changes twice, and two sub-agents that begin at the same moment.
"""

import copy
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import tiny_models
from agent_templates import IN_CHANNELS, IN_TAGS, TEMPLATE
from helpers import MODEL
from mlx.utils import tree_flatten
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)

from mlx_turboquant.conversations.index import as_tokens, common_length

__all__ = ["IN_CHANNELS", "IN_TAGS", "TEMPLATE"]


def _tool(name, about, *arguments):
    fields = {a: {"type": "string", "description": f"the {a}"} for a in arguments}
    parameters = {"type": "object", "properties": fields, "required": list(arguments)}
    function = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("read_file", "Read a file and return its lines, numbered.", "path"),
    _tool("search", "Find lines that hold a word, in all files.", "word", "folder"),
    _tool("edit", "Put one text in the place of another.", "path", "old", "new"),
    _tool("run", "Run a command in the shell and return what it prints.", "command"),
]
SYSTEM = """\
You are a careful assistant who works on a small program that keeps the books of a
public library: who has borrowed which book, until when, and what is owed for it.
Read before you write. Change as little as is needed, and run the tests after every
change. Say what you did in two sentences, without praise. Never delete a file that you
have not read. If something is unclear, ask before you go on; if a test fails that you
have not touched, say so and leave it. Dates are written as year, month and day. Money
is counted in whole cents. Names of readers are never printed to the log.
Session: """
SUB_SYSTEM = """\
You look things up for another assistant and change nothing. Read the files that seem
to matter, no more than five, and answer with what you found: the file, the line, and a
sentence about it. Do not guess. If there is nothing to be found, say that there is
nothing. You have no memory of other questions, and nobody will answer yours. Files of
the library's program are in the folder src, its tests in the folder tests, and what it
prints for readers in the folder letters. The money that is owed is in fees.py, the
dates in terms.py, and who has borrowed what in loans.py; reports are made by
reports.py, which reads the other three and writes nothing back.
Session: of a helper"""
HEADERS = {0: "Monday, the first", 11: "Monday, the second", 21: "Tuesday, the first"}

#: A user's turn; what the tools then return, one request each.
TURNS = [
    (
        "A reader says that she was asked to pay for a book that she had brought back "
        "in time. Please find out why.",
        "fees.py:14: def owed(loan, today):\nfees.py:22: days = today - loan.due\n"
        "loans.py:40: loan.due = terms.due_date(loan.start)",
        "10 def owed(loan, today):\n11     if loan.returned:\n12         return 0\n"
        "13     days = (today - loan.due).days\n14     return max(0, days) * 20",
        "30 def due_date(start, weeks=4):\n31     return start + weeks * WEEK\n"
        "32 def is_open(day):\n33     return day.weekday() < 6",
    ),
    (
        "So what is wrong? She brought it on a Monday, and the Sunday before was the "
        "last day.",
        "tests/test_terms.py:8: assert due_date(MONDAY) == MONDAY + 4 * WEEK\n"
        "tests/test_terms.py:12: assert not is_open(SUNDAY)",
    ),
    (
        "Then let a term that ends on a closed day end on the next open one.",
        "edited terms.py: 1 place",
        "12 tests ran, 11 passed, 1 failed\ntests/test_letters.py: the letter says the "
        "fourth of May, and the fifth was expected",
        "1 Dear reader,\n2 the book {title} was due on {date}.\n3 Please bring it back "
        "to the desk, which is open from Monday to Saturday.",
        "edited tests/test_letters.py: 1 place\n12 tests ran, 12 passed",
    ),
    (
        "Good. Are there other places that count days by themselves? Ask two helpers, "
        "one for the program and one for the letters.",
    ),
    (
        "What did they find?",
        "reports.py:51: late = [loan for loan in loans if today > loan.due]\n"
        "reports.py:77: days = (today - loan.start).days - 28",
        "70 def oldest(loans, today):\n71     # four weeks and a day are late\n"
        "72     days = [(today - loan.start).days - 28 for loan in loans]\n"
        "73     return max(days, default=0)",
        "edited reports.py: 2 places\n12 tests ran, 12 passed",
    ),
    (
        "And holidays? The library is closed on the first of May and for the week "
        "between the years.",
        "1 [library]\n2 name = 'Old Mill'\n3 closed = ['05-01', '12-25']\n4 fee = 20",
        "edited terms.py: 2 places",
        "13 tests ran, 12 passed, 1 failed\ntests/test_terms.py: a term that ends on "
        "the last day of the year goes on into the next one, and it did not",
        "edited terms.py: 1 place\n13 tests ran, 13 passed",
    ),
    (
        "Write it down for the people at the desk, in a few plain sentences.",
        "1 For the desk\n2 Books are lent for four weeks.\n3 What is brought back late "
        "costs twenty cents a day.",
        "edited docs/desk.txt: 1 place",
    ),
    (
        "One more thing: the letter should say until when the desk is open that day.",
        "open = {0: '9 to 18', 1: '9 to 18', 2: '9 to 20', 3: '9 to 18', "
        "4: '9 to 18', 5: '10 to 14'}",
        "edited letters.py: 1 place",
        "14 tests ran, 14 passed",
        "printed letters/example.txt: 1 page",
    ),
    ("Thank you. Is anything left that you would change?",),
]
THOUGHTS = (
    "The user wants one thing at a time. I should look at the file first, then at the "
    "test that holds it, and only then at what calls it."
)
SUB_TASKS = [
    ("Where are days counted in the folder src?", "reports.py:77: days = 28"),
    ("Where do the letters name a date?", "letters.py:12: loan.due.isoformat()"),
]


def arguments(max_tokens):
    """Greedy generation of so many tokens."""
    return GenerationArguments(
        ModelDescription("default_model", "default_model", None),
        SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.0),
        LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
        [],
        max_tokens,
        0,
        False,
        0,
        None,
        None,
    )


class Session:
    """Puts requests to a generator, and counts what it read.

    Attributes:
        read: Tokens that it read, by request.
        new: Tokens of each that no earlier request or answer began with.
        texts: Answers.
    """

    def __init__(self, generator, answer_tokens=8):
        self.generator, self.answer_tokens = generator, answer_tokens
        self.read, self.new, self.texts = [], [], []
        self._seen, self._lock = [], threading.Lock()

    def ask(self, messages, tools=TOOLS):
        """The answer's text."""
        request = CompletionRequest("chat", "", copy.deepcopy(messages), tools, None)
        with self._lock:
            ctx, answers = self.generator.generate(
                request, arguments(self.answer_tokens)
            )
            prompt = as_tokens(ctx.prompt)
            common = max((common_length(prompt, s) for s in self._seen), default=0)
            self._seen.append(prompt)
            self.new.append(max(1, len(prompt) - common))
            self.read.append(len(prompt) - ctx.prompt_cache_count)
        got = list(answers)
        with self._lock:
            tokens = [response.token for response in got]
            self._seen.append(np.concatenate([prompt, as_tokens(tokens)]))
            self.texts.append(text := "".join(response.text for response in got))
        return text

    @property
    def ratio(self):
        """Tokens read over tokens new."""
        return sum(self.read) / sum(self.new)


def play(session, turns=TURNS, with_calls=False):
    """The whole session, or its first turns; with calls of tools, or results only."""
    messages, asked = [{"role": "system", "content": SYSTEM + HEADERS[0]}], 0
    for text, *results in turns:
        messages.append({"role": "user", "content": text})
        for result in [None, *results]:
            if result is not None:
                messages.append(_result(messages, result, with_calls))
            header = HEADERS.get(asked)
            if header is not None:
                messages[0] = {"role": "system", "content": SYSTEM + header}
            messages.append(_answer(session.ask(messages)))
            asked += 1
        if "two helpers" in text:
            with ThreadPoolExecutor(2) as pool:
                found = pool.map(
                    lambda task: _help(session, *task, with_calls), SUB_TASKS
                )
            messages[-1]["content"] += " ".join(found)


def _answer(text):
    # Templates differ in what they call it.
    thoughts = dict.fromkeys(("reasoning", "reasoning_content"), THOUGHTS)
    return {"role": "assistant", "content": text, **thoughts}


def _result(messages, result, with_calls):
    """What a tool gave back, for which the last answer becomes a call of it."""
    said = {"role": "tool", "content": result}
    if with_calls:
        name, number = TOOLS[len(result) % len(TOOLS)]["function"], len(messages)
        values = dict.fromkeys(name["parameters"]["properties"], result[:12])
        call = {"name": name["name"], "arguments": json.dumps(values)}
        calls = [{"id": f"call_{number}", "type": "function", "function": call}]
        messages[-1] = {**messages[-1], "tool_calls": calls}
        said["tool_call_id"] = f"call_{number}"
    return said


def _help(session, task, result, with_calls):
    messages = [
        {"role": "system", "content": SUB_SYSTEM},
        {"role": "user", "content": task},
    ]
    messages.append(_answer(session.ask(messages)))
    messages.append(_result(messages, result, with_calls))
    return session.ask(messages)


#: Models to play it on, by name: mlx-lm's type, and what differs from the tiny ones.
MODELS = {
    "llama": ("llama", {"layer_types": ["full_attention"] * 4}),
    "sliding window": ("gemma3_text", {"sliding_window": 256}),
    "hybrid": ("qwen3_next", {}),
    "hybrid (mamba)": ("falcon_h1", {}),
    "jamba": ("jamba", {}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 256}),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "lfm2": ("lfm2", {}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layer_types": [
                *("linear_attention", "full_attention", "mlp", "full_attention")
            ]
        },
    ),
    "qwen3_5": ("qwen3_5", {}),
}


def save_tiny(name, folder):
    """Save a tiny random model of one type of `MODELS`, with the books' tokenizer."""
    home, changes = MODELS[name]
    size = {"vocab_size": 16384, "max_position_embeddings": 16384, **changes}
    with tiny_models_of(size):
        model, config = tiny_models.build(home), tiny_models.config(home)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, folder / file)
    return folder


class tiny_models_of:
    """Makes `tiny_models` build with other values meanwhile."""

    def __init__(self, changes):
        self._changes = changes

    def __enter__(self):
        self._usual = dict(tiny_models.USUAL)
        tiny_models.USUAL.update(self._changes)

    def __exit__(self, *error):
        tiny_models.USUAL.clear()
        tiny_models.USUAL.update(self._usual)
