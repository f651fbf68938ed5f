"""`PrefixIndex`: which of many texts a new one has most of its beginning from.

Texts are hashed block by block, each hash over the one before it, so equal hashes are
equal beginnings, whoever wrote them. What is found is compared token by token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

#: Tokens of a block: a page's, as specs have it by default.
BLOCK = 128

Tokens = npt.NDArray[np.int32]
Value = TypeVar("Value")


def as_tokens(tokens: Sequence[int]) -> Tokens:
    """Token ids as an array."""
    return np.asarray(tokens, np.int32)


def common_length(a: Tokens, b: Tokens, known: int = 0) -> int:
    """Tokens that two texts begin with alike.

    Args:
        a: A text.
        b: Another.
        known: How many are known to be equal.

    >>> common_length(as_tokens([1, 2, 3]), as_tokens([1, 2, 4, 3]))
    2
    """
    count = min(len(a), len(b))
    different = np.flatnonzero(a[known:count] != b[known:count])
    return known + int(different[0]) if different.size else count


def chain(root: bytes, tokens: Tokens, block: int = BLOCK) -> Iterator[bytes]:
    """A hash of each whole block of a text and of all before it.

    Args:
        root: What else they depend on.
        tokens: The text.
        block: Tokens of a block.
    """
    data, size = np.ascontiguousarray(tokens).data.cast("B"), 4 * block
    for start in range(0, len(data) - size + 1, size):
        root = hashlib.blake2b(
            data[start : start + size], key=root, digest_size=16
        ).digest()
        yield root


class PrefixIndex(Generic[Value]):
    """Values by the texts they belong to; equal texts of one root replace each other.

    Args:
        block: Tokens of a block.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        # By root and hash, values by the whole text; the root's own key is its id.
        self._sharing: dict[tuple[Hashable, bytes], dict[bytes, Value]] = {}
        self._texts: dict[tuple[Hashable, bytes], Tokens] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def _keys(self, root: Hashable, tokens: Tokens) -> list[tuple[Hashable, bytes]]:
        return [(root, b""), *((root, k) for k in chain(b"", tokens, self._block))]

    def add(self, root: Hashable, tokens: Tokens, value: Value) -> Value | None:
        """Remember a text's value; returns the one that it replaces, if any.

        Args:
            root: What else the text depends on: a model.
            tokens: The text.
            value: What belongs to it.
        """
        text = tokens.tobytes()
        replaced = self.remove(root, tokens)
        self._texts[root, text] = tokens
        for key in self._keys(root, tokens):
            self._sharing.setdefault(key, {})[text] = value
        return replaced

    def remove(self, root: Hashable, tokens: Tokens) -> Value | None:
        """Forget a text; returns its value, if it had one."""
        text, value = tokens.tobytes(), None
        if self._texts.pop((root, text), None) is None:
            return None
        for key in self._keys(root, tokens):
            values = self._sharing[key]
            value = values.pop(text)
            if not values:
                del self._sharing[key]
        return value

    def longest(
        self, root: Hashable, tokens: Tokens, usable: Callable[[Value, int], int]
    ) -> tuple[int, Value | None]:
        """The value that is good for most of a text.

        Args:
            root: As for `add`.
            tokens: The text.
            usable: How many tokens a value is good for, with the number that its text
                has in common with this one: no more than that.

        Returns:
            How many tokens, and the value; 0 and None if there is none.
        """
        best, found = 0, None
        for value, _, common in self._sharing_with(root, tokens):
            length = usable(value, common) if common > best else 0
            if length > best:
                best, found = length, value
        return best, found

    def in_common(self, root: Hashable, tokens: Tokens) -> int:
        """The longest beginning that any text has in common with this one."""
        return max((n for _, _, n in self._sharing_with(root, tokens)), default=0)

    def beginnings(self, root: Hashable, tokens: Tokens) -> list[Value]:
        """Values of the texts that a text goes on from, the shortest first."""
        found = [
            (size, value)
            for value, size, common in self._sharing_with(root, tokens)
            if size == common < len(tokens)
        ]
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def _sharing_with(
        self, root: Hashable, tokens: Tokens
    ) -> Iterator[tuple[Value, int, int]]:
        """(value, tokens of its text, tokens in common) of all that begin alike.

        Those that have more whole blocks in common come first.
        """
        seen: set[bytes] = set()
        known = [key for key in self._keys(root, tokens) if key in self._sharing]
        for depth, key in reversed(list(enumerate(known))):
            for text, value in self._sharing[key].items():
                if text not in seen:
                    seen.add(text)
                    own = self._texts[root, text]
                    common = common_length(own, tokens, depth * self._block)
                    yield value, len(own), common
