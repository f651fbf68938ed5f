"""Text to measure on: the bundled held-out books, or any file.

The bundled books (Project Gutenberg, public domain) were
kept out of the bundled model's training; for other models they are just English.
"""

from __future__ import annotations

import lzma
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..regular import check_regular

_MARGIN = 20_000  # characters skipped at the front: title pages, tables of contents
_CHARACTERS = 7  # more than any English token needs, on average


def books() -> list[str]:
    """The bundled books, one text each."""
    packed = files("mlx_turboquant").joinpath("data/books_heldout.txt.xz")
    text = lzma.decompress(packed.read_bytes()).decode()
    return text.split("\n\x0c\n")


def read_texts(path: str | Path | None) -> list[str]:
    """The texts of a UTF-8 file (form feeds between them), or the bundled books.

    Raises:
        SpecError: if it cannot be read, or is empty.
    """
    if path is None:
        return books()
    try:
        check_regular(Path(path))
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no file, no path, no UTF-8
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"cannot read text from {path} ({reason})") from error
    texts = [part for part in text.split("\n\x0c\n") if part.strip()]
    if not texts:
        raise SpecError(f"there is no text in {path}; give another file")
    return texts


def windows(
    texts: list[str], tokenizer: Any, length: int, count: int
) -> list[list[int]]:
    """``count`` stretches of ``length`` tokens, spread over the texts.

    Raises:
        SpecError: if the texts are too short for that.
    """
    stretches = []
    for index in range(count):
        text = texts[index % len(texts)]
        turn = index // len(texts)
        size = _CHARACTERS * length
        start = min(_MARGIN + turn * size, max(0, len(text) - size))
        ids = _encode(tokenizer, text[start:], length)
        if len(ids) < length:
            raise SpecError(
                f"text {index % len(texts)} gives {len(ids)} tokens, not {length}; "
                "give a longer text or shorter lengths"
            )
        stretches.append(ids)
    return stretches


def _encode(tokenizer: Any, text: str, length: int) -> list[int]:
    """The first ``length`` tokens, paragraph by paragraph, after the model's BOS."""
    bos = tokenizer.bos_token_id
    ids = [] if bos is None else [bos]
    for paragraph in text.split("\n\n"):
        ids += tokenizer.encode(paragraph + "\n\n", add_special_tokens=False)
        if len(ids) >= length:
            break
    return ids[:length]
