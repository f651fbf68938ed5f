"""The table of supported models in ``docs/models.md``, made from what `explain` says.

``python tests/support_table.py`` writes it; test_models.py holds each row to the file.
"""

import textwrap
import warnings
from collections import Counter

from helpers import ROOT
from tiny_models import NOT_BUILT, build, types

import mlx_turboquant as tq
from mlx_turboquant.errors import UnsupportedModelError

FILE = ROOT / "docs" / "models.md"
#: Small enough for a window of 56 tokens to be compressed.
SPEC = "8,window=4,sink=2,page=32"
HEAD = """\
# Models

What every model type of mlx-lm 0.32.2 does with `--kv-bits`, found by building a tiny
random one of each (`tests/tiny_models.py`) and asking `tq.explain`; made by
`python tests/support_table.py` and held by `tests/test_models.py`, which also compares
the logits of two chunks of a prompt and two decode steps at 8 bits with mlx-lm's own
cache: they differ by less than 1% of the logits' spread. Types that may have sliding
windows, such as llama, have them here.

Of 43 types some layer stands at one place of its text: a recurrent state, a chunk, a
full window. A server or a chat keeps these at places, goes on from the nearest, and
brings them back after a restart (`--kv-dir`), with the logits of reading all anew, to
the bit if in the same pieces and within 1% of their spread in others
(`tests/test_families_kept.py`; `jamba`, `gpt_oss`, `granitemoehybrid`, `nemotron_h`,
`qwen3_5`, `qwen3_next`, `falcon_h1`, `lfm2` and `gemma3_text` through a server as
well). Where no place is near enough it says so and reads. `plamo3` and
`recurrent_gemma` do not come back after a restart: no layer of theirs keeps codes of
all tokens, which a folder finds texts by.

"""
TABLE = """\
## By type

*codes*: attention reads packed codes, by a kernel where there is one. *sliding*: a
window of tokens, compressed if it is at least sink + window + two pages long (292
tokens unless said otherwise). *decoded*: the model computes attention itself, so all of
a layer is decoded at each step: it saves memory between steps, not time. Counts are
layers of the tiny models, most of which have four. *In slanted letters:* what moves a
model's logits that is no fault of its cache (`tests/test_models.py` compares it with as
much noise on mlx-lm's own caches).

<!-- not measured: layers of tiny models, held by tests -->

| model type | codes | sliding | decoded | left to mlx-lm |
|---|---|---|---|---|
"""
#: Models that a rounding moves further than others. Random ones of mlx-lm's size for
#: its tests, 230 tokens in three pieces and six steps at 8 bits (errors of .005), over
#: two sets of weights; noise is of the codes' size, on mlx-lm's own caches, five times.
NOTES = {
    "afm7": "rounds keys and values itself; with steps of 1, as without trained "
    "weights, 8 bits move the logits by .14 of their spread, as much noise on mlx-lm's "
    "own caches by .12 to .19; with steps of .001: .0014",
    "laguna": "a rounding can choose other experts: 2 of 4 chosen, 8 bits move the "
    "logits by .003 to .026, as much noise on mlx-lm's own caches by .025 to .067; all "
    "chosen: .003",
    "phimoe": "its router drops experts below a threshold, however many are chosen: 8 "
    "bits move the logits by .018 to .031, as much noise on mlx-lm's own caches by "
    ".026 to .051",
    "step3p5": "a rounding can choose other experts: 1 of 4 chosen, 8 bits move the "
    "logits by .10, as much noise on mlx-lm's own caches by .08 to .17; all chosen, "
    "windows included: .004",
}
#: Where the part on mlx-vlm's models begins, which `vlm_table` writes.
VLM_HEADING = "## Vision and audio models, through mlx-vlm\n"
#: What a model's line means for its user, the first that applies.
GROUPS = {
    "refused": "No layer can be compressed",
    "not tried": "Not tried here",
    "decoded": "Layers are decoded at each step, which saves memory and not time",
    "left": "Some layers stay mlx-lm's: recurrent states, chunks, keys of an index",
    "sliding": "Attention reads codes; sliding windows too, if they are long enough",
    "codes": "Attention reads codes in every layer",
}


def row(name, caches):
    """One model's line."""
    counts = Counter()
    left = Counter()
    for layer in tq.explain(caches).layers:
        if not layer.spec:
            left[f"{layer.cache}: {layer.reason}"] += 1
        elif layer.returns_arrays:
            counts["decoded"] += 1
        elif layer.cache == "RotatingTurboQuantCache":
            counts["sliding"] += 1
        else:
            counts["codes"] += 1
    cells = [str(counts[kind] or "") for kind in ("codes", "sliding", "decoded")]
    last = "; ".join(f"{n} {text}" for text, n in sorted(left.items()))
    note = f"*{NOTES[name]}*" if name in NOTES else ""
    cells.append(f"{last} {note}".strip())
    return f"| {name} | {' | '.join(cells)} |"


def refusal(name, error):
    """The line of a model that takes no compressed cache."""
    return f"| {name} | | | | refused: {error.reason} |"


def line(name):
    """The line of any type."""
    if name in NOT_BUILT:
        return f"| {name} | | | | not tried: {NOT_BUILT[name]} |"
    try:
        with warnings.catch_warnings(action="ignore"):
            return row(name, tq.make_prompt_cache(build(name), SPEC))
    except UnsupportedModelError as error:
        return refusal(name, error)


def name_of(text):
    """The model type of a line."""
    return text.split("|")[1].strip()


def group_of(text):
    """The key in `GROUPS` of a line."""
    _, _, _, sliding, decoded, left, _ = (cell.strip() for cell in text.split("|"))
    left = left.partition("*")[0].strip()
    said = left.partition(":")[0]
    if said in GROUPS:
        return said
    filled = {"decoded": decoded, "left": left, "sliding": sliding, "codes": True}
    return next(key for key in GROUPS if filled.get(key))


def summary(lines):
    """The types of each group, as paragraphs."""
    for key, title in reversed(GROUPS.items()):
        names = ", ".join(name_of(text) for text in lines if group_of(text) == key)
        yield textwrap.fill(f"**{title}:** {names}.", 88, break_on_hyphens=False)


def parts():
    """The file's part on mlx-lm's models, and the part behind it."""
    own, heading, behind = FILE.read_text().partition(VLM_HEADING)
    return own, heading + behind


def main():
    """Write the first part of the file."""
    lines = sorted(line(name) for name in [*types(), *NOT_BUILT])
    groups = "\n\n".join(summary(lines))
    own = f"{HEAD}{groups}\n\n{TABLE}" + "\n".join(lines)
    FILE.write_text(f"{own}\n\n{parts()[1]}")


if __name__ == "__main__":
    main()
