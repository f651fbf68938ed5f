"""Basic blocks and natural loops of the kernel in LLVM's textual code.

Owns no meaning of instructions (`counts`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LABEL = re.compile(r"^([\w.$-]+):")
_TARGET = re.compile(r"label %([\w.$-]+)")


@dataclass
class Block:
    """Instructions of a block, and where it may go on."""

    lines: list[str] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)


Function = dict[str, Block]


def blocks_of(code: str) -> Function:
    """Blocks of the one kernel in ``code``, by label, the entry first."""
    body = re.search(r"^define .*amdgpu_kernel [^\n]*\{\n(.*?)^\}", code, re.M | re.S)
    if body is None:
        raise ValueError("no kernel in LLVM's code")
    function: Function = {}
    block = function[""] = Block()
    for line in body[1].splitlines():
        if label := _LABEL.match(line):
            block = function[label[1]] = Block()
        elif text := line.strip():
            block.lines.append(text)
            if re.match(r"(br|switch) |label %", text) or text.endswith("]"):
                block.successors += _TARGET.findall(text)
    # The entry's own label is left out, or written once: nothing goes back to it.
    return {name: b for name, b in function.items() if name or b.lines}


def loops_of(function: Function) -> list[frozenset[str]]:
    """Natural loops: blocks of each, those of one header together."""
    dominators = _dominators(function)
    before = _predecessors(function)
    loops: dict[str, set[str]] = {}
    for name, block in function.items():
        for header in block.successors:
            if name in dominators and header in dominators[name]:
                loops.setdefault(header, {header}).update(_body(header, name, before))
    return [frozenset(blocks) for blocks in loops.values()]


def _body(header: str, latch: str, before: dict[str, list[str]]) -> set[str]:
    """Blocks from which the latch is reached without the header."""
    found, waiting = {header}, [latch]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += before[name]
    return found


def _predecessors(function: Function) -> dict[str, list[str]]:
    before: dict[str, list[str]] = {name: [] for name in function}
    for name, block in function.items():
        for successor in block.successors:
            before[successor].append(name)
    return before


def _dominators(function: Function) -> dict[str, set[str]]:
    """Of every block that is reached, the blocks that all ways to it go through."""
    before = _predecessors(function)
    first = next(iter(function))
    order, seen = [], {first}
    waiting = [first]
    while waiting:
        name = waiting.pop()
        order.append(name)
        for successor in function[name].successors:
            if successor not in seen:
                seen.add(successor)
                waiting.append(successor)
    found = {name: set(order) for name in order}
    found[first] = {first}
    changed = True
    while changed:
        changed = False
        for name in order[1:]:
            ways = [found[b] for b in before[name] if b in found]
            new = set.intersection(*ways) | {name}
            if new != found[name]:
                found[name], changed = new, True
    return found
