"""What forks are made with: `Forks`, their method, and `shallow`, their copies."""

from __future__ import annotations

import copy
from typing import Self, TypeVar

T = TypeVar("T")


class Forks:
    """What can be taken further in several ways."""

    def fork(self) -> Self:
        """The same tokens, which go their own way from here on.

        Pages of codes are shared for good, uncompressed tokens until one of the two is
        written to. ``copy.deepcopy`` and ``copy.copy`` do the same. A thread that goes
        on with another thread's fork copies its pages first.
        """
        return copy.deepcopy(self)

    def __copy__(self) -> Self:
        return self.fork()


def shallow(original: T) -> T:
    """Another object of the class, with the same attributes in a dict of its own.

    It takes a third of ``copy.copy``'s time: a fork of a conversation makes four for
    every layer, and is to cost nothing.
    """
    copied = object.__new__(type(original))
    copied.__dict__.update(original.__dict__)
    return copied
