"""What a saved layer's arrays must be, given its header (``docs/format.md``).

Names, shapes, dtypes, counts of tokens and of pages, numbers that are numbers: all of
it is looked at before any of it is used, as kernels read what they are told to. What a
file says of other layers, or of the model, is `integrations.prompt_fit`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import mlx.core as mx

from ..codecs import codec_for
from ..codecs.base import Codec, Side
from ..codecs.scaled import ScaledCodec
from ..errors import FormatError, UnsupportedError
from ..spec import CacheSpec, CodecSpec
from ..tiles import tile_layout
from ..tokens import TILE

Groups = Mapping[str, Mapping[str, mx.array]]
Numbers = Mapping[str, int]
#: (dtype, last axis) of each array that a codec makes.
Made = dict[str, tuple[mx.Dtype, int]]

_FLOATS = (mx.float16, mx.bfloat16, mx.float32)
_FLAGS = ("returns_arrays", "tiles", "sees_kept", "scored")
_MOST = 2**31 - 1


def check(spec: CacheSpec, groups: Groups, numbers: Numbers) -> None:
    """Make sure that a layer's arrays are what its header says.

    Args:
        spec: Of the header.
        groups: The arrays, by group and name.
        numbers: The other words of the header.

    Raises:
        FormatError: naming the first array or number that is not.
    """
    _check_numbers(spec, numbers)
    filled = [name for name, arrays in groups.items() if arrays]
    if not groups["recent"]:
        _demand(not filled, f"it has {', '.join(filled)} and no recent tokens")
        return
    _Layer(spec, groups, numbers).check()
    for group, arrays in groups.items():
        for name, array in arrays.items():
            if mx.issubdtype(array.dtype, mx.floating):
                finite = mx.all(mx.isfinite(array)).item()
                _demand(finite, f"{group}:{name} is not finite")


class _Layer:
    """One layer's header and arrays.

    Attributes:
        dims: Elements of a key and of a value.
        packed: Tokens that are codes.
    """

    def __init__(self, spec: CacheSpec, groups: Groups, numbers: Numbers) -> None:
        self.spec, self.groups, self.numbers = spec, groups, numbers

    def check(self) -> None:
        spec, sides = self.spec, self._sides("recent")
        self.batch, self.heads, recent = sides["keys"].shape[:3]
        self.dims = {side: array.shape[3] for side, array in sides.items()}
        self._check_dims()
        self.codecs: dict[str, Codec] = {}
        for side, codec in (("keys", spec.keys), ("values", spec.values)):
            self.codecs[side] = _codec(codec, self.dims[side], side, spec.seed)
        self.packed = self._check_packed()
        evicted = self.numbers.get("evicted_pages", 0)
        gone = self.numbers.get("evicted_sink", 0)
        sink = self._check_sink()
        begun = bool(self.packed or evicted)
        expected = spec.sink - gone if begun else 0
        _demand(sink == expected, f"its sink has {sink} tokens, not {expected}")
        _demand(not (spec.adaptive and begun), "there are codes before bits are chosen")
        self._check_means()
        self._check_gains(begun)
        tokens = sink + self.packed + recent
        self._check_queries(begun, tokens)
        self._check_window(tokens, gone + evicted)

    def _sides(self, group: str) -> Mapping[str, mx.array]:
        """A group's keys and values, equally many vectors of one dtype."""
        arrays = self.groups[group]
        _demand(set(arrays) == {"keys", "values"}, f"{group} is not keys and values")
        keys, values = arrays["keys"], arrays["values"]
        for name, array in arrays.items():
            _demand(
                array.ndim == 4 and array.dtype in _FLOATS and min(array.shape[:2]) > 0,
                f"{group}:{name} is {array.dtype} {array.shape}",
            )
        _demand(
            keys.shape[:3] == values.shape[:3],
            f"{group} has keys {keys.shape} and values {values.shape}",
        )
        return arrays

    def _check_dims(self) -> None:
        for side, dim in self.dims.items():
            _demand(dim > 0, f"{side} have {dim} elements")

    def _check_sink(self) -> int:
        if not self.groups["sink"]:
            return 0
        recent = self.groups["recent"]
        for side, array in self._sides("sink").items():
            wanted = self.batch, self.heads, array.shape[2], self.dims[side]
            self._is("sink", side, recent[side].dtype, wanted)
        return int(self.groups["sink"]["keys"].shape[2])

    def _check_packed(self) -> int:
        arrays = self.groups["packed"]
        if not arrays:
            return 0
        in_tiles = bool(self.numbers["tiles"])
        made: Made = {}
        for side, codec in self.codecs.items():
            like = self.groups["recent"][side].dtype
            of_side = _made(codec, side, in_tiles, like)
            made |= {f"{side}_{name}": what for name, what in of_side.items()}
        _demand(
            set(arrays) == set(made),
            f"it has codes {sorted(arrays)}, and its codec makes {sorted(made)}",
        )
        rows = next(iter(arrays.values())).shape[2:3]
        _demand(bool(rows) and rows[0] > 0, "there are no codes in its codes")
        for name, (dtype, width) in made.items():
            self._is("packed", name, dtype, (self.batch, self.heads, rows[0], width))
        for side, codec in self.codecs.items():
            if isinstance(codec, ScaledCodec):  # others have differences among theirs
                scales = arrays[f"{side}_scales"]
                _demand(
                    mx.all(scales >= 0).item(),
                    f"packed:{side}_scales is not 0 or above",
                )
        return int(rows[0]) * (TILE if in_tiles else 1)

    def _check_means(self) -> None:
        means, spec = self.groups["means"], self.spec
        centred = spec.center == "page" and self.codecs["keys"].wants_centering
        if not (self.packed and centred):
            _demand(not means, "it has means that nothing is centred by")
            return
        _demand(set(means) == {"keys"}, "its codes have no means")
        pages = -(-self.packed // spec.page)
        wanted = self.batch, self.heads, pages, self.dims["keys"]
        self._is("means", "keys", mx.float16, wanted)

    def _check_gains(self, begun: bool) -> None:
        gains, spec = self.groups["gains"], self.spec
        wanted = {}
        for side, codec in self.codecs.items():
            if spec.equalize and codec.wants_equalizing:
                wanted[side] = mx.float32
            if codec.wants_ordering:
                wanted[f"{side}_order"] = mx.uint16
        if not gains and not begun:
            return
        _demand(
            set(gains) == set(wanted),
            f"it has gains {sorted(gains)}, and its codec wants {sorted(wanted)}",
        )
        for name, dtype in wanted.items():
            dim = self.dims[name.removesuffix("_order")]
            self._is("gains", name, dtype, (self.batch, self.heads, 1, dim))
            array = gains[name]
            if dtype == mx.uint16:
                order = mx.sort(array, axis=-1) == mx.arange(dim)
                _demand(mx.all(order).item(), f"gains:{name} is no order of channels")
            else:
                _demand(mx.all(array > 0).item(), f"gains:{name} is not above 0")

    def _check_queries(self, begun: bool, tokens: int) -> None:
        queries, spec = self.groups["queries"], self.spec
        if not queries:
            return
        _demand(set(queries) == {"squares"}, "queries are not squares")
        _demand(not begun and not self.groups["gains"], "queries outlived the gains")
        seen = queries["squares"].shape[2:3]
        _demand(
            bool(seen) and seen[0] <= min(spec.sink + spec.page, tokens),
            "it has more queries than its first page",
        )
        wanted = self.batch, self.heads, seen[0], self.dims["keys"]
        self._is("queries", "squares", mx.float32, wanted)

    def _check_window(self, tokens: int, gone: int) -> None:
        """What is hidden, or evicted, must have been there."""
        _demand(tokens + gone <= _MOST, f"it has {tokens + gone} tokens")
        if "max_size" not in self.numbers or "scored" in self.numbers:
            return  # nothing is hidden then
        first, keep = self.numbers["first_visible"], self.numbers["keep"]
        hidden = first - gone - keep
        _demand(
            0 <= first <= tokens + gone and hidden <= max(0, tokens - keep),
            f"first_visible={first} is not among {tokens + gone} tokens",
        )
        evicted = self.numbers["evicted_pages"]
        _demand(
            not evicted or self.spec.sink + evicted <= first,
            f"evicted_pages={evicted} were still to be seen",
        )

    def _is(
        self, group: str, name: str, dtype: mx.Dtype, shape: tuple[int, ...]
    ) -> None:
        array = self.groups[group][name]
        _demand(
            array.dtype == dtype and array.shape == shape,
            f"{group}:{name} is {array.dtype} {array.shape}, not {dtype} {shape}",
        )


def _check_numbers(spec: CacheSpec, numbers: Numbers) -> None:
    for name in _FLAGS:
        number = numbers.get(name, 0)
        _demand(number in (0, 1), f"{name}={number} is neither 0 nor 1")
    if "max_size" not in numbers:
        return
    shortest = spec.sink + spec.window + 2 * spec.page
    limits = {
        "max_size": (shortest, _MOST),
        "keep": (0, spec.sink),
        "evicted_sink": (0, spec.sink),
        "evicted_pages": (0, _MOST),
        "first_visible": (0, _MOST),
    }
    for name, (least, most) in limits.items():
        number = numbers.get(name, -1)
        _demand(least <= number <= most, f"{name}={number} is outside {least}..{most}")
    gone, pages = numbers["evicted_sink"], numbers["evicted_pages"]
    _demand(pages % spec.page == 0, f"evicted_pages={pages} are no whole pages")
    is_cut = pages and "scored" not in numbers
    if "scored" in numbers:
        for name in ("first_visible", "returns_arrays"):
            _demand(numbers[name] == 0, f"{name}={numbers[name]} is not 0")
    expected = spec.sink - numbers["keep"] if is_cut else 0
    _demand(gone == expected, f"evicted_sink={gone} is not {expected}")


def _codec(spec: CodecSpec, dim: int, side: str, seed: int) -> Codec:
    of_side: Side = "keys" if side == "keys" else "values"
    try:
        return codec_for(spec, dim, of_side, seed)
    except UnsupportedError as error:
        raise _damaged(error.reason) from error


@functools.lru_cache(maxsize=256)
def _made(codec: Codec, side: Side, in_tiles: bool, like: mx.Dtype) -> Made:
    """What a codec's own encoding makes of a vector; nothing of it is computed."""
    if in_tiles:
        _demand(codec.kernel_format is not None, f"{codec.spec} has no tile order")
        layout = tile_layout(codec, side)
        return {
            "words": (mx.uint32, layout.tile_words),
            "scales": (mx.float16, layout.tile_scales),
        }
    codes = codec.encode(mx.zeros((1, 1, 1, codec.dim), like))
    return {name: (a.dtype, a.shape[3]) for name, a in codes.arrays.items()}


def _demand(is_so: object, otherwise: str) -> None:
    if not is_so:
        raise _damaged(otherwise)


def _damaged(what: str) -> FormatError:
    return FormatError(
        f"the cache's arrays do not fit its header: {what}; make the cache again"
    )
