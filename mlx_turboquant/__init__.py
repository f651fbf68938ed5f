"""TurboQuant KV caches for MLX: longer contexts in the same memory.

>>> import mlx_turboquant as tq
>>> from mlx_lm import load, generate
>>> model, tokenizer = load("mlx-community/Llama-3.2-3B-Instruct-4bit")
>>> tq.apply(model, "k4v3")
>>> generate(model, tokenizer, "hello")

The public names are imported when first used, so that ``mlx_tq --help`` is instant. A
BLAS for MLX's CPU backend is loaded at once, because it must come before MLX; before
that, an install that is mixed with another package of the same folder is refused.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .blas import prefer_openblas
from .namesake import refuse_namesake
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import errors as errors
    from .attention import attend as attend
    from .cache import BatchTurboQuantCache as BatchTurboQuantCache
    from .cache import RotatingTurboQuantCache as RotatingTurboQuantCache
    from .cache import ScoredTurboQuantCache as ScoredTurboQuantCache
    from .cache import TurboQuantCache as TurboQuantCache
    from .codecs import CodecInfo as CodecInfo
    from .codecs import codec_for as codec_for
    from .codecs import register_codec as register_codec
    from .conversations.disk import DiskFolder as DiskFolder
    from .evals import EvalPlan as EvalPlan
    from .evals import evaluate as evaluate
    from .explanation import explain as explain
    from .integrations.compiled_step import compiled as compiled
    from .integrations.conversation import Conversation as Conversation
    from .integrations.factory import apply as apply
    from .integrations.factory import make_prompt_cache as make_prompt_cache
    from .integrations.factory import uninstall as uninstall
    from .integrations.footprint import footprint as footprint
    from .integrations.loading import load as load
    from .integrations.prompt_files import load_prompt_cache as load_prompt_cache
    from .integrations.prompt_files import save_prompt_cache as save_prompt_cache
    from .integrations.prompt_store import PromptStore as PromptStore
    from .quantizer import Quantizer as Quantizer
    from .spec import CacheSpec as CacheSpec
    from .spec import CodecSpec as CodecSpec
    from .tokens import TokenArrays as TokenArrays

refuse_namesake(__path__[0])
prefer_openblas()

_HOMES = {
    "BatchTurboQuantCache": "cache",
    "CacheSpec": "spec",
    "CodecInfo": "codecs",
    "CodecSpec": "spec",
    "Conversation": "integrations.conversation",
    "DiskFolder": "conversations.disk",
    "EvalPlan": "evals",
    "PromptStore": "integrations.prompt_store",
    "Quantizer": "quantizer",
    "RotatingTurboQuantCache": "cache",
    "ScoredTurboQuantCache": "cache",
    "TokenArrays": "tokens",
    "TurboQuantCache": "cache",
    "apply": "integrations.factory",
    "attend": "attention",
    "codec_for": "codecs",
    "compiled": "integrations.compiled_step",
    "evaluate": "evals",
    "explain": "explanation",
    "footprint": "integrations.footprint",
    "load": "integrations.loading",
    "load_prompt_cache": "integrations.prompt_files",
    "make_prompt_cache": "integrations.factory",
    "register_codec": "codecs",
    "save_prompt_cache": "integrations.prompt_files",
    "uninstall": "integrations.factory",
}

__all__ = [*sorted(_HOMES), "errors"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
