"""The part of ``docs/models.md`` on mlx-vlm's models, beside `support_table`'s own.

``python tests/vlm_table.py`` writes it; test_vlms.py holds each row to the file.
"""

import warnings

from support_table import FILE, SPEC, VLM_HEADING, parts, refusal, row
from tiny_vlms import FAMILIES, build

import mlx_turboquant as tq
from mlx_turboquant.errors import UnsupportedModelError

HEAD = """\

The same for models that [mlx-vlm](https://github.com/Blaizzy/mlx-vlm) 0.7.10 loads
(`pip install 'mlx-tq[vlm]'`): tiny random ones (`tests/tiny_vlms.py`), each with an
image, a video or a sound of its own that goes through its own tower; made by
`python tests/vlm_table.py` and held by `tests/test_vlms.py`, which compares what
mlx-vlm's own loop says behind a prompt in two chunks, over six decode steps at 8 bits,
with mlx-vlm's own caches (less than 1% of the spread apart), and a step behind a prompt
with that prompt one token longer. `gemma3n`, `minicpmo`, `molmo` and `phi3_v` were
given text alone: their towers have one size, a large one. Other types have not been
tried; a dry run decides about them, too.

<!-- not measured: layers of tiny models, held by tests -->

| model type | codes | sliding | decoded | left to mlx-vlm |
|---|---|---|---|---|
"""


def name_in_table(name):
    """A family's name, with its medium in words."""
    return name.replace(":", ", ")


def line(name):
    """The row of a family."""
    try:
        with warnings.catch_warnings(action="ignore"):
            caches = tq.make_prompt_cache(build(name), SPEC)
    except UnsupportedModelError as error:
        return refusal(name_in_table(name), error)
    return row(name_in_table(name), caches)


def main():
    """Write that part of the file."""
    lines = sorted(line(name) for name in FAMILIES)
    own, _ = parts()
    FILE.write_text(f"{own.rstrip()}\n\n{VLM_HEADING}{HEAD}" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
