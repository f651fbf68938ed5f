"""`Key`: what a verdict on kernels is about; if any of it changes, it says nothing.

Subject   what the kernels are specialised for: codecs, dims, dtype, pages
Machine   where they ran: GPU, its cores, the system's build, versions
texts     a hash of every kernel source in ``metal/``
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import plistlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..codecs import codec_for
from ..codecs.base import Side
from ..kernels import source
from ..quantizer import PageMeans, Quantizer, Sides
from ..spec import CodecSpec
from ..transform import ChannelTransform
from ..version import __version__

_SYSTEM_VERSION = Path("/System/Library/CoreServices/SystemVersion.plist")


@dataclass(frozen=True)
class Subject:
    """What kernels are specialised for.

    Attributes:
        keys: Codec of the keys, ``"turboquant:3"``.
        values: Codec of the values.
        k_dim: Elements of a key.
        v_dim: Elements of a value.
        page: Tokens that share a key mean; 0 if none is taken off.
        dtype: Of the model, ``"bfloat16"``.
        templates: What the kernels' template arguments are, as text.
    """

    keys: str
    values: str
    k_dim: int
    v_dim: int
    page: int
    dtype: str
    templates: str

    @classmethod
    def of(
        cls, keys: Quantizer, values: Quantizer, dtype: mx.Dtype, templates: str
    ) -> Subject:
        """Of two quantizers and the dtype of the model."""
        return cls(
            str(keys.codec.spec),
            str(values.codec.spec),
            keys.codec.dim,
            values.codec.dim,
            0 if keys.means is None else keys.means.page,
            str(dtype).removeprefix("mlx.core."),
            templates,
        )

    def quantizers(self, gains: Sides[mx.array]) -> Sides[Quantizer]:
        """Quantizers that kernels are specialised for alike, without page means yet."""
        of_sides: tuple[tuple[Side, str, int], ...]
        of_sides = (
            ("keys", self.keys, self.k_dim),
            ("values", self.values, self.v_dim),
        )
        sides = []
        for side, text, dim in of_sides:
            name, bits = text.rsplit(":", 1)
            codec = codec_for(CodecSpec.of(name, float(bits)), dim, side)
            transform = ChannelTransform(codec.rotation, getattr(gains, side))
            means = PageMeans(self.page) if side == "keys" and self.page else None
            sides.append(Quantizer(codec, transform, side, means))
        return Sides(*sides)

    def __str__(self) -> str:
        dims = f"{self.k_dim}/{self.v_dim}"
        return f"{self.keys} and {self.values}, head_dim {dims}, {self.dtype}"


@dataclass(frozen=True)
class Key:
    """What a verdict is about.

    Attributes:
        subject: What the kernels are specialised for.
        machine: Names and numbers of `machine`.
        texts: `text_hash` of the sources.
    """

    subject: Subject
    machine: dict[str, str]
    texts: str

    @functools.cached_property
    def digest(self) -> str:
        """24 hexadecimal digits that name it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def machine(dialect: str, simdgroups: int) -> dict[str, str]:
    """What a verdict holds for, besides the kernels themselves.

    Args:
        dialect: The launcher's name.
        simdgroups: How many fill its GPU, which tells its cores.
    """
    info: dict[str, Any] = dict(mx.device_info())
    return {
        "dialect": dialect,
        "device": str(info.get("device_name", "")),
        "architecture": str(info.get("architecture", "")),
        "simdgroups": str(simdgroups),
        "system": system_build(),
        "mlx": str(vars(mx)["__version__"]),
        "package": __version__,
    }


def system_build(plist: Path = _SYSTEM_VERSION) -> str:
    """The build of macOS, which changes with its compiler; elsewhere the kernel's."""
    try:
        return str(plistlib.loads(plist.read_bytes())["ProductBuildVersion"])
    except (OSError, ValueError, KeyError, plistlib.InvalidFileException):
        return os.uname().version


@functools.cache
def text_hash() -> str:
    """Of every file in ``metal/``: a kernel changes with what it includes."""
    folder = str(source.metal_folder())
    found = hashlib.blake2b(digest_size=12)
    for path in sorted(_files(folder)):
        found.update(f"{path.removeprefix(folder)}\n".encode())
        # Every start of a program that uses kernels reads them: no buffers, no `Path`.
        with open(path, "rb", buffering=0) as file:
            found.update(file.readall())
    return found.hexdigest()


def _files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(entry.path)
            else:
                yield entry.path
