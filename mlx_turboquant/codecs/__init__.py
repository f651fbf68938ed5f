"""KV codecs: one method per file, all behind `base.Codec`."""

from . import identity, turboquant
from .base import Codec, codec_for

__all__ = ["Codec", "codec_for", "identity", "turboquant"]
