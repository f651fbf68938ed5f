"""`SavedTexts`: caches of texts as records of a folder, page by page.

    head   what one text's beginning fixed for all that follows: gains, the sink
    page   codes of all layers that keep all tokens; written once, whoever shares it
    tail   what a text has behind its last whole page, and the whole of what stands at
           one place of it: windows, recurrent states

A text whose layers all keep all tokens is restored from its pages alone if its tail is
not there: as a text that was cut there. Others need a tail. Owns keys and forms of the
records; how they are kept is ``conversations/disk.py``'s.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host_cache
import numpy as np
from rich.filesize import decimal

from ..cache import TurboQuantCache
from ..conversations.disk import DiskFolder
from ..conversations.index import Tokens, chain, common_length
from ..conversations.record_files import Record
from ..conversations.records import Bytes, array_of, bytes_of, pack, unpack
from ..errors import TurboQuantError
from . import hook
from .fingerprint import fingerprint
from .page_layout import nothing, page_layout, page_nbytes, shape_of
from .stock import keeps_all, labelled_leaves, replace_leaves

_HEAD, _PAGE, _TAIL = 1, 2, 3
#: Pages whose bytes are gathered together.
_AT_ONCE = 16
#: Damaged records that are passed over before a text is read again.
_ATTEMPTS = 4


@dataclass(frozen=True)
class Found:
    """What a folder has of a text.

    Attributes:
        length: Tokens of the text that it is good for.
        head, pages: Keys of both.
        tail: The tail's key; None if pages are all.
        tokens: What it has seen, with the tail's tokens.
    """

    length: int
    head: bytes
    pages: list[bytes]
    tail: bytes | None
    tokens: Tokens


class SavedTexts:
    """One model's texts in a folder.

    Args:
        folder: The folder.
        networks: As for `fingerprint`.
        caches: As for `fingerprint`.
    """

    def __init__(
        self, folder: DiskFolder, networks: Sequence[nn.Module], caches: Sequence[Any]
    ) -> None:
        self.folder = folder
        self._root = fingerprint(networks, caches)
        self._empty = copy.deepcopy(list(caches))
        leaves = _leaves(caches)
        self._growing = [
            i for i, leaf in enumerate(leaves) if type(leaf) is TurboQuantCache
        ]
        shapes = {(leaves[i].spec.sink, leaves[i].spec.page) for i in self._growing}
        hook.register()  # classes of ours, by name
        known = all(hasattr(host_cache, type(leaf).__name__) for leaf in leaves)
        #: Whether texts of this model can be saved at all.
        self.is_possible = known and len(shapes) == 1
        sink, page = shapes.pop() if self.is_possible else (0, 1)
        self._sink: int = sink
        self._page: int = page
        self._keeps_all = keeps_all(caches)
        #: Bytes that were written: of pages, and of what is behind the last.
        self.page_bytes = self.tail_bytes = 0
        if not self.is_possible:
            logging.warning(
                "KV folder: texts of this model are not kept in it: no layer keeps "
                "codes of all tokens, or layers differ in sink and page"
            )

    # Writing.

    def save(
        self,
        tokens: Tokens,
        caches: Sequence[Any],
        whole: bool,
        is_wanted: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Write what is not there yet of a text; whether nothing is left to write.

        What does not fit into the folder's hour is left for later: a text's first pages
        are of use without the others.

        Args:
            tokens: The text.
            caches: What has seen it.
            whole: Also its tail; else its pages only.
            is_wanted: Whether somebody waits: asked between pages.
        """
        leaves = _leaves(caches)
        growing = [leaves[i] for i in self._growing]
        if not self.is_possible or any(c.offset != len(tokens) for c in growing):
            return True  # it never can be
        count = min(cache.packed_length // self._page for cache in growing)
        if not count:
            return True  # too short to be worth it
        states = [dict(cache.state) for cache in growing]
        size = count * sum(
            page_nbytes(*pair) for pair in zip(growing, states, strict=True)
        )
        if size > self.folder.limit:
            logging.info(
                f"KV folder: {decimal(size)} of a text do not fit in --kv-disk "
                f"{decimal(self.folder.limit)}"
            )
            return True
        head = self._head(tokens, growing, states)
        keys = self._page_keys(head.key, tokens)[:count]
        first = max(0, self.folder.known([head.key, *keys]) - 1)
        given_up = False

        def records() -> Iterator[Record]:
            nonlocal given_up
            yield head
            for page in self._pages(states, growing, keys, first):
                if given_up := is_wanted():
                    return
                yield page
                self.page_bytes += page.size  # whoever asks for the next has taken it
            if whole:
                tail = self._tail(tokens, leaves, states, growing, keys)
                is_new = not self.folder.known([tail.key])
                yield tail
                self.tail_bytes += tail.size * is_new

        done = self.folder.write(records(), [head.key, *keys][first]) and not given_up
        self.folder.known([head.key, *keys])  # used alike, what came before included
        return done

    def _first_key(self, tokens: Tokens) -> bytes:
        first = np.ascontiguousarray(tokens[: self._sink + self._page])
        return _key(self._root, first.tobytes())

    def _page_keys(self, head: bytes, tokens: Tokens) -> list[bytes]:
        return list(chain(head, tokens[self._sink :], self._page))

    def _head(
        self, tokens: Tokens, growing: Sequence[Any], states: Sequence[dict[str, Any]]
    ) -> Record:
        layers = [
            {
                name: value
                for name, value in state.items()
                if name == "header" or name.startswith(("sink:", "gains:"))
            }
            for state in states
        ]
        recent = [shape_of(state, "recent:") for state in states]
        layout = [
            page_layout(cache, state)
            for cache, state in zip(growing, states, strict=True)
        ]
        # What they are decoded with, so that no page is read with another's.
        fixed = [
            (name, bytes_of(value).tobytes() if name != "header" else value.encode())
            for layer in layers
            for name, value in sorted(layer.items())
            if not name.startswith("sink:")
        ]
        first = self._first_key(tokens)
        lineage = hashlib.blake2b(digest_size=16)
        for name, value in fixed:
            lineage.update(name.encode())
            lineage.update(value)
        data = pack({"layers": layers, "recent": recent, "layout": layout})
        return Record(_key(first, lineage.digest()), first, _HEAD, data)

    def _pages(
        self,
        states: Sequence[dict[str, Any]],
        growing: Sequence[Any],
        keys: Sequence[bytes],
        first: int,
    ) -> Iterator[Record]:
        for start in range(first, len(keys), _AT_ONCE):
            count = min(_AT_ONCE, len(keys) - start)
            columns = []
            for cache, state in zip(growing, states, strict=True):
                for name, _, heads, rows, width in page_layout(cache, state):
                    array = state[name][0, :, start * rows : (start + count) * rows]
                    by_page = array.reshape(heads, count, rows * width).swapaxes(0, 1)
                    columns.append(bytes_of(by_page).reshape(count, -1))
            for i, row in enumerate(np.concatenate(columns, axis=1), start):
                parent = keys[i - 1] if i else b""
                yield Record(keys[i], parent, _PAGE, [row.data])

    def _tail(
        self,
        tokens: Tokens,
        leaves: Sequence[Any],
        states: Sequence[dict[str, Any]],
        growing: Sequence[Any],
        keys: Sequence[bytes],
    ) -> Record:
        layers = []
        for cache, state in zip(growing, states, strict=True):
            rows = {name: n for name, _, _, n, _ in page_layout(cache, state)}
            layers.append(
                {
                    name: array[:, :, rows[name] * len(keys) :]
                    if name in rows
                    else array
                    for name, array in state.items()
                    if name != "header" and not name.startswith(("sink:", "gains:"))
                }
            )
        others = [
            [i, type(leaf).__name__, leaf.state]
            for i, leaf in enumerate(leaves)
            if i not in self._growing
        ]
        behind = tokens[self._sink + self._page * len(keys) :].tobytes()
        data = pack({"layers": layers, "others": others})
        own = _key(keys[-1], behind)
        return Record(own, keys[-1], _TAIL, data, behind, goes_on=False)

    # Reading.

    def longest(self, tokens: Tokens) -> Found | None:
        """What is good for most of a text; None if nothing is."""
        best: Found | None = None
        if not self.is_possible or len(tokens) < self._sink + self._page:
            return None
        for head, _ in self.folder.children(self._first_key(tokens), _HEAD):
            keys = self._page_keys(head, tokens)
            keys = keys[: self.folder.known(keys)]
            end = self._sink + self._page * len(keys)
            if self._keeps_all and keys and (best is None or end > best.length):
                best = Found(end, head, keys, None, tokens[:end])
            for count in range(len(keys), 0, -1):
                start = self._sink + self._page * count
                if best is not None and best.length >= start + self._page:
                    break  # no tail of these is longer
                for key, note in self.folder.children(keys[count - 1], _TAIL):
                    behind = np.frombuffer(note, np.int32)
                    common = common_length(behind, tokens[start:])
                    if common < len(behind) and not self._keeps_all:
                        continue
                    if best is None or start + common >= best.length:
                        seen = np.concatenate([tokens[:start], behind])
                        best = Found(start + common, head, keys[:count], key, seen)
        return best

    def load(self, tokens: Tokens, least: int) -> tuple[Tokens, list[Any]] | None:
        """A text's tokens and caches that are good for more than ``least`` of a text.

        Args:
            tokens: The text.
            least: How many it has to be good for, at least.
        """
        for _ in range(_ATTEMPTS):
            found = self.longest(tokens)
            if found is None or found.length < least:
                return None
            tail = [] if found.tail is None else [found.tail]
            data = self.folder.read([found.head, *found.pages, *tail])
            if data is None:
                continue  # what is left may do
            try:
                return found.tokens, self._caches(data, len(found.pages))
            except (TurboQuantError, ValueError, KeyError, IndexError) as error:
                logging.warning(f"KV folder: a text cannot be restored ({error})")
                return None
        return None

    def _caches(self, data: Sequence[Bytes], pages: int) -> list[Any]:
        head = unpack(data[0])
        of_pages = data[1 : 1 + pages]
        tail = unpack(data[1 + pages]) if len(data) > 1 + pages else None
        at, made = 0, {}
        for i, layer in enumerate(head["layers"]):
            rest = tail["layers"][i] if tail else nothing(head["recent"][i])
            state = {**layer, **rest}
            for name, dtype, heads, rows, width in head["layout"][i]:
                size = heads * rows * width * getattr(mx, dtype).size
                part = np.concatenate([page[at : at + size] for page in of_pages])
                at += size
                array = array_of(part, dtype, (pages, heads, rows * width))
                array = array.swapaxes(0, 1).reshape(1, heads, pages * rows, width)
                behind = rest.get(name)
                state[name] = (
                    array
                    if behind is None or not behind.size
                    else mx.concatenate([array, behind], axis=2)
                )
            made[self._growing[i]] = TurboQuantCache.from_state(state)
        for i, kind, state in tail.get("others", ()) if tail else ():
            made[i] = getattr(host_cache, kind).from_state(state)
        restored = (made[i] for i in range(len(made)))
        caches = replace_leaves(copy.deepcopy(self._empty), lambda _: next(restored))
        mx.eval([cache.state for cache in caches])
        return caches


def _leaves(caches: Sequence[Any]) -> list[Any]:
    return [leaf for _, leaf in labelled_leaves(caches)]


def _key(root: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=root, digest_size=16).digest()
