"""KV codecs: a method per file behind `base.Codec`, listed in `registry`.

Importing this package imports neither MLX nor a codec; the codecs that exist to be
compared with are in `research`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registry import CodecInfo, codec_for, codec_info, codec_names, register_codec

if TYPE_CHECKING:
    from .base import Codec

__all__ = [
    "Codec",
    "CodecInfo",
    "codec_for",
    "codec_info",
    "codec_names",
    "register_codec",
]


def __getattr__(name: str) -> Any:
    if name == "Codec":
        from .base import Codec

        return Codec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
