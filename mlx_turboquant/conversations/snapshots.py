"""Where states that cannot be cut are kept, so that a text can be gone back in.

A recurrent state or a full sliding window stands at one place of its text. `stops` says
at which places of a prompt to keep it, `spread` which of those kept to give up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: Tokens from one place to the next in a text without messages.
EVERY = 1024
#: The same in a system prompt and tools, whose lines change without notice.
EVERY_IN_BEGINNING = 256
#: Places there at most.
_IN_BEGINNING = 8
#: Places closer than this are one: reading so few again costs less than a snapshot.
CLOSE = 16


def stops(length: int, ends: Iterable[int], beginning: int = 0) -> list[int]:
    """Places at which to keep the states of a prompt while it is read.

    Args:
        length: Tokens of the prompt.
        ends: Where its parts end: tools, system prompt, messages. Of two that are
            `CLOSE` the earlier counts: the later is a few tokens from there.
        beginning: Tokens of the system prompt and tools.

    Returns:
        Ascending, all above 0; the last is in front of the last token, which is read
        when the answer begins.

    >>> stops(3000, [600, 2990, 2995], 600)
    [256, 512, 600, 1624, 2648, 2990, 2999]
    """
    last = length - 1
    chosen: list[int] = []
    for end in sorted({end for end in ends if 0 < end < last}):
        if not chosen or end - chosen[-1] >= CLOSE:
            chosen.append(end)
    within = max(EVERY_IN_BEGINNING, -(-beginning // _IN_BEGINNING))
    places, at = [], 0
    for end in [*chosen, last]:
        while end - at > (step := within if at < beginning else EVERY):
            at += step
            places.append(at)
        if end > at:
            places.append(end)
            at = end
    return places


def spread(places: Sequence[int], most: int) -> list[int]:
    """Which places to give up, so that ``most`` are left.

    Those left are dense at the end of the text, where going back is likely, and wide
    apart before; the first and the last stay.

    Args:
        places: Ascending.
        most: How many may stay, at least 2.

    >>> spread([100, 200, 300, 400, 450], 4)
    [200]
    """
    left, gone = list(places), []
    while len(left) > max(2, most):
        end = left[-1]

        def loss(i: int, end: int = end) -> float:
            return (left[i + 1] - left[i - 1]) / (end - left[i])

        worst = min(range(1, len(left) - 1), key=loss)
        gone.append(left.pop(worst))
    return gone
