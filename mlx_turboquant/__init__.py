"""TurboQuant KV caches for MLX: longer contexts in the same memory.

>>> import mlx_turboquant as tq
>>> from mlx_lm import load, generate
>>> model, tokenizer = load("mlx-community/Llama-3.2-3B-Instruct-4bit")
>>> tq.apply(model, "k4v3")
>>> generate(model, tokenizer, "hello")

Owns the public names. They are imported when first used, so that ``mlx_tq --help`` is
instant. Importing the package before MLX chooses MLX's BLAS on Linux, see `blas`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .blas import prefer_openblas

if TYPE_CHECKING:
    from . import errors as errors
    from .attention import attend as attend
    from .cache import BatchTurboQuantCache as BatchTurboQuantCache
    from .cache import RotatingTurboQuantCache as RotatingTurboQuantCache
    from .cache import TurboQuantCache as TurboQuantCache
    from .codebook import lloyd_max as lloyd_max
    from .codecs import codec_for as codec_for
    from .evals import EvalPlan as EvalPlan
    from .evals import evaluate as evaluate
    from .explanation import explain as explain
    from .integrations.factory import apply as apply
    from .integrations.factory import make_prompt_cache as make_prompt_cache
    from .integrations.factory import uninstall as uninstall
    from .integrations.footprint import footprint as footprint
    from .integrations.loading import load as load
    from .integrations.prompt_files import load_prompt_cache as load_prompt_cache
    from .integrations.prompt_files import save_prompt_cache as save_prompt_cache
    from .rotation import rotation_for as rotation_for
    from .spec import CacheSpec as CacheSpec
    from .spec import CodecSpec as CodecSpec
    from .tokens import TokenArrays as TokenArrays

prefer_openblas()

__version__ = "0.1.0"

_HOMES = {
    "BatchTurboQuantCache": "cache",
    "CacheSpec": "spec",
    "CodecSpec": "spec",
    "EvalPlan": "evals",
    "RotatingTurboQuantCache": "cache",
    "TokenArrays": "tokens",
    "TurboQuantCache": "cache",
    "apply": "integrations.factory",
    "attend": "attention",
    "codec_for": "codecs",
    "evaluate": "evals",
    "explain": "explanation",
    "footprint": "integrations.footprint",
    "lloyd_max": "codebook",
    "load": "integrations.loading",
    "load_prompt_cache": "integrations.prompt_files",
    "make_prompt_cache": "integrations.factory",
    "rotation_for": "rotation",
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
