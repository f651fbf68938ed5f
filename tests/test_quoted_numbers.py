"""Numbers that README and docs quote are those of the runs in benchmarks/results.

A table, or a paragraph, says above itself which files its numbers are from:

    <!-- numbers: step-h100.txt; lines 3; quotient 6 3 5 -->

The numbers of a row must then stand together in at most so many lines of these files
(one, unless said otherwise), rounded to the digits that are quoted; an entry of a JSON
file is a line. Column 6 here is column 3 over column 5. With ``thousands``, numbers in
the files may be thousands of those quoted (MB and GB). A paragraph's numbers may stand
in any lines. ``log:scale-search`` is a section of dev/LOG.md, by the beginning of its
heading (all that begin so). Code is no number. A table that quotes no run says so:
<!-- not measured: why -->.
"""

import functools
import json
import re
import tomllib

import draw_frontier
import model_apple
import plan_models
import pytest
from helpers import ROOT

import mlx_turboquant as tq

RESULTS = ROOT / "benchmarks" / "results"
#: Pages on which a table of numbers has to say where they are from.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = re.compile(r"<!-- (?:numbers|(not measured)): ([^>]*?) -->")
NUMBER = re.compile(
    r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<!\.)\.\d+)?(?:(?<=\d)e-?\d+)?"
)
FRACTION = re.compile(r"(?<![\w/])\d+/\d+(?![\w/])")
CODE, LINK = re.compile(r"`[^`]*`"), re.compile(r"\]\([^)]*\)")


def numbers_in(text):
    """Numbers and fractions (11/12) of a text, as it writes them."""
    fractions = FRACTION.findall(text)
    rest = FRACTION.sub(" ", text).replace("..", " ")
    return [m[0] for m in NUMBER.finditer(rest) if m[0]] + fractions


class Line:
    """What a line of a log, or an entry of a JSON file, says in numbers."""

    def __init__(self, text):
        found = numbers_in(text)
        self.fractions = {n for n in found if "/" in n}
        self.numbers = [float(n.replace(",", "")) for n in found if "/" not in n]

    def has(self, quoted, scales):
        if "/" in quoted:
            return quoted in self.fractions
        return any(is_rounded(n / s, quoted) for n in self.numbers for s in scales)


class Source:
    """What a comment above a table says."""

    def __init__(self, text):
        names, *options = (part.split() for part in text.replace(",", " ").split(";"))
        self.names = names
        said = {name: list(map(int, numbers)) for name, *numbers in options}
        assert said.keys() <= {"lines", "quotient", "thousands"}, text
        self.depth = said.get("lines", [1])[0]
        self.quotient = said.get("quotient")
        self.scales = (1, 1000) if "thousands" in said else (1,)
        self.lines = [line for name in names for line in read(name)]


@functools.cache
def log():
    """Sections of dev/LOG.md by heading, in words with hyphens, without its date."""
    sections = re.split(r"^## ", (ROOT / "dev" / "LOG.md").read_text(), flags=re.M)
    texts = {}
    for section in sections[1:]:
        heading, _, text = section.partition("\n")
        words = re.sub(r"\d{4}-\d\d-\d\d", "", heading).lower()
        texts[re.sub(r"\W+", "-", words).strip("-")] = text
    return texts


@functools.cache
def read(name):
    if name.startswith("log:"):
        text = "\n".join(log()[key] for key in log() if key.startswith(name[4:]))
        assert text, name
    else:
        text = (RESULTS / name).read_text()
    if name.endswith(".json"):
        return [Line(json.dumps(entry)) for entry in json.loads(text).values()]
    return [Line(line) for line in text.splitlines()]


def is_rounded(number, quoted):
    """Whether a number, rounded to the digits of a quoted one, is that."""
    text = quoted.replace(",", "")
    step = 10.0 ** -len(text.partition(".")[2])
    return abs(number - float(text)) <= step / 2 * (1 + 1e-6)


def explains(source, quoted, depth):
    """Whether so many lines have all numbers together."""
    if not quoted or depth == 0:
        return not quoted
    having = ([x for x in source.lines if x.has(n, source.scales)] for n in quoted)
    return any(
        explains(source, [n for n in quoted if not x.has(n, source.scales)], depth - 1)
        for x in min(having, key=len)
    )


def is_quotient(cells):
    """Whether a cell's number is that of the next over that of the last, about."""
    quoted, above, below = (numbers_in(cell)[0].replace(",", "") for cell in cells)
    ratio = float(above) / float(below)
    return abs(ratio - float(quoted)) < 0.5 * 10 ** -len(quoted.partition(".")[2]) + (
        ratio * (0.005 / float(above) + 0.005 / float(below))
    )


def plain(text):
    """Text without code and addresses, whose digits are no numbers."""
    return LINK.sub("]", CODE.sub(" ", text))


def blocks(page):
    """(comment or None, lines) of each table, and of each paragraph with a comment."""
    comment, inside = None, False
    for block in re.split(r"\n{2,}", page.read_text()):
        inside ^= block.count("```") % 2 == 1
        found = SOURCE.match(block)
        block = SOURCE.sub("", block).strip("\n")
        if found:
            comment = found[1] or found[2]
        if not block:
            continue
        if not inside and (comment or block.startswith("|")):
            yield comment, block.splitlines()
        comment = None


def rows_of(lines):
    """Cells of each row of a table behind its head."""
    for line in lines[2:]:
        yield line, [plain(cell) for cell in line.strip()[1:-1].split("|")]


def untrue(page):
    """What a page quotes that its files do not say."""
    for comment, lines in blocks(page):
        table = lines[0].startswith("|")
        if comment is None:
            if any(numbers_in(cell) for _, row in rows_of(lines) for cell in row):
                yield f"{lines[0]}: does not say where its numbers are from"
            continue
        if comment == "not measured":
            continue
        source = Source(comment)
        if not table:
            for number in numbers_in(plain(" ".join(lines))):
                if not any(line.has(number, source.scales) for line in source.lines):
                    yield f"{number} is not in {source.names}: {lines[0]}"
            continue
        for line, cells in rows_of(lines):
            if source.quotient:
                if not is_quotient([cells[column - 1] for column in source.quotient]):
                    yield f"column {source.quotient[0]} is off: {line}"
                cells[source.quotient[0] - 1] = ""
            quoted = [number for cell in cells for number in numbers_in(cell)]
            if not explains(source, quoted, source.depth):
                yield f"not in {source.depth} lines of {source.names}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_numbers_are_those_of_a_run(page):
    assert not list(untrue(page))


def test_the_readme_quotes_runs():
    """Quality, time and memory, and what fits."""
    said = [Source(comment) for comment, _ in blocks(PAGES[0]) if comment]
    named = {name for source in said for name in source.names}
    assert {"eval-h100.txt", "step-h100.txt", "memory-h200.txt", "plan.txt"} <= named


def test_the_headline_is_what_the_table_below_it_says():
    """How much longer: 16 bits over those of our first and last settings."""
    tables = dict(blocks(PAGES[0]))
    (comment,) = (said for said in tables if said and said.startswith("eval-"))
    source, table = Source(comment), tables[comment]
    ours = [cells for line, cells in rows_of(table) if "--kv-bits" in line]
    bits = [float(numbers_in(cells[1])[0]) for cells in ours]
    assert len(bits) == 4
    assert all(any(x.has(f"{b}", (1,)) for x in source.lines) for b in bits)
    least, most = (int(16 / b) for b in (max(bits), min(bits)))
    said = f"contexts {least} to {most} times as long in the same memory"
    first = (ROOT / "README.md").read_text().split("\n\n")[1]
    assert first.endswith(f"at 2 to {max(bits):.0f} bits instead of 16: {said}.")
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert about["description"].endswith(said)


def test_a_wrong_number_is_seen(tmp_path):
    """A digit, a number of another row, one digit more than there is."""
    page = tmp_path / "page.md"
    table = "<!-- numbers: plan.txt -->\n\n| model | memory |\n|---|---|\n| 3B | {} |\n"
    for row, fine in (
        ("8 GB, 28,928 and 92,323", True),
        ("`7 GB`, 28,928", True),
        ("8 GB, 28,929 and 92,323", False),
        ("16 GB, 28,928", False),
        ("32,768: .88 and 0.885", False),
        ("32,768: .88", True),
    ):
        page.write_text(table.format(row))
        assert (not list(untrue(page))) == fine, row
    page.write_text(table.partition("\n\n")[2].format("8 GB"))
    assert list(untrue(page))
    for number, fine in ((".946", True), (".947", False), ("0.95", True)):
        page.write_text(f"<!-- numbers: log:scale-search -->\n\nThree bits: {number}\n")
        assert (not list(untrue(page))) == fine, number


def test_the_plan_is_what_the_code_says():
    assert (RESULTS / "plan.txt").read_text().splitlines() == list(plan_models.lines())


def test_the_model_of_apples_gpus_is_what_the_code_says(capsys):
    """By hand, and by the operations that tests/metaltext/budgets.json has."""
    model_apple.main()
    assert (RESULTS / "apple-modelled.txt").read_text() == capsys.readouterr().out


def test_pictures_are_of_these_runs():
    """Drawn from the logs as they are, and bytes as codecs have them."""
    assert draw_frontier.digest() in draw_frontier.PICTURE.read_text()
    drawn = [point.name for point in draw_frontier.points()]
    assert {"affine:4", "k3v3", "k2v2,codec=trellis"} <= set(drawn)
    spec = tq.CacheSpec.parse(3)
    sides = [
        tq.codec_for(spec.keys, 128, "keys"),
        tq.codec_for(spec.values, 128, "values"),
    ]
    a_token = sum(codec.bits_per_vector for codec in sides) / 8 + 2 * 128 / spec.page
    picture = (ROOT / "docs" / "pictures" / "cache.svg").read_text()
    assert f"{a_token:.0f} bytes: {8 * a_token / 256:.2f} bits" in picture
    assert f"{spec.window} to {spec.window + spec.page - 1} tokens" in picture
