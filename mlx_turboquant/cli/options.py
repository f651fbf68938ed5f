"""Options that several commands share: mlx-lm's names, then ours.

Owns help texts and defaults; `cache_spec` is where the KV options become a spec.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import SpecError
from ..spec import CENTERS, QUALITIES, CacheSpec

DEFAULT_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"  # as in mlx-lm

Model = Annotated[
    str | None,
    typer.Option(help=f"A model folder or hub id. Default: {DEFAULT_MODEL}."),
]
AdapterPath = Annotated[str | None, typer.Option(help="Trained adapter weights.")]
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Run code that comes with the model or tokenizer.")
]
ExtraEosToken = Annotated[
    list[str] | None, typer.Option(help="One more token that ends generation.")
]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System prompt for the chat template.")
]
Prompt = Annotated[
    str, typer.Option("--prompt", "-p", help="The prompt; '-' reads stdin.")
]
PrefillResponse = Annotated[
    str | None, typer.Option(help="Start of the answer, for the chat template.")
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate at most.")
]
Temp = Annotated[float, typer.Option(min=0, help="Sampling temperature.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sampling top-p.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Sampling min-p.")]
TopK = Annotated[int, typer.Option(min=0, help="Sampling top-k.")]
XtcProbability = Annotated[
    float, typer.Option(min=0, max=1, help="Chance of XTC sampling per token.")
]
XtcThreshold = Annotated[
    float, typer.Option(min=0, max=0.5, help="Probability XTC cuts above.")
]
MinTokensToKeep = Annotated[int, typer.Option(min=1, help="Kept by min-p sampling.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler.")]
IgnoreChatTemplate = Annotated[
    bool, typer.Option(help="Use the prompt as it is, without a chat template.")
]
ChatTemplateConfig = Annotated[
    str | None, typer.Option(help="JSON options for the chat template.")
]
Verbose = Annotated[
    str, typer.Option(help="'False' or 'F' prints the answer and nothing else.")
]
MaxKvSize = Annotated[
    int | None,
    typer.Option(min=1, help="Keep only so many tokens, the first 4 among them."),
]
PrefillStepSize = Annotated[
    int, typer.Option(min=1, help="Prompt tokens processed at a time.")
]
PromptCacheFile = Annotated[
    str | None, typer.Option(help="Go on from a cache saved by save_prompt_cache.")
]
DraftModel = Annotated[
    str | None, typer.Option(help="A smaller model for speculative decoding.")
]
NumDraftTokens = Annotated[int, typer.Option(min=1, help="Tokens drafted at a time.")]

Pipeline = Annotated[
    bool,
    typer.Option(help="Under mlx.launch: split by layers, not by tensors."),
]
DraftKvBits = Annotated[
    str | None,
    typer.Option(help="Compress the draft model's KV cache, as --kv-bits."),
]

KvBits = Annotated[
    str | None,
    typer.Option(
        help="Compress the KV cache: 1..8 bits per element, a half step (3.5 is "
        "k4v3), sides such as k4v3 or k16v4, another mean such as 3.25 (bits chosen "
        "by layer), or auto (see --kv-quality). Default: no compression."
    ),
]
KvQuality = Annotated[
    str | None,
    typer.Option(
        help=f"For --kv-bits auto: {', '.join(QUALITIES)} (default: balanced)."
    ),
]
KvCodec = Annotated[
    str | None,
    typer.Option(help="Codec: turboquant (default), trellis or rotated-int4."),
]
KvWindow = Annotated[
    int | None, typer.Option(help="Most recent tokens kept uncompressed.")
]
KvSink = Annotated[int | None, typer.Option(help="First tokens kept uncompressed.")]
KvPage = Annotated[int | None, typer.Option(help="Tokens compressed together.")]
KvCenter = Annotated[
    str | None,
    typer.Option(
        help=f"Key mean subtracted first: {', '.join(CENTERS)} (default: page)."
    ),
]
KvEqualize = Annotated[
    bool | None,
    typer.Option(help="Divide channels by gains of the first page (default: on)."),
]
KvSeed = Annotated[int | None, typer.Option(help="Seed of the random rotation.")]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

#: Options of `with_spec`, by the names `cache_spec` has for them.
_KV_OPTIONS = {
    "bits": KvBits,
    "quality": KvQuality,
    "codec": KvCodec,
    "window": KvWindow,
    "sink": KvSink,
    "page": KvPage,
    "center": KvCenter,
    "equalize": KvEqualize,
    "seed": KvSeed,
}


def with_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all ``--kv-`` options; it takes them as one ``spec``.

    ``spec`` is a `CacheSpec`, or None without ``--kv-bits``.
    """
    hints = get_type_hints(command, include_extras=True)
    own = [p for p in signature(command).parameters.values() if p.name != "spec"]
    added = {f"kv_{name}": kind for name, kind in _KV_OPTIONS.items()}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {name: given.pop(f"kv_{name}") for name in _KV_OPTIONS}
        command(spec=cache_spec(**values), **given)

    keyword = Parameter.KEYWORD_ONLY
    own = [p.replace(kind=keyword, annotation=hints[p.name]) for p in own]
    extra = [
        Parameter(name, keyword, default=None, annotation=kind)
        for name, kind in added.items()
    ]
    run.__signature__ = Signature([*own, *extra])  # type: ignore[attr-defined]
    hints.pop("spec")
    run.__annotations__ = {**hints, **added}
    return run


def cache_spec(bits: str | None, **overrides: Any) -> CacheSpec | None:
    """The spec of ``--kv-bits`` and its companions, or None without it.

    Raises:
        SpecError: for a bad value, or a companion without ``--kv-bits``.
    """
    if bits is None and overrides["quality"] is not None:
        raise SpecError("--kv-quality needs --kv-bits auto")
    if bits is not None:
        return CacheSpec.parse(bits, **overrides)
    given = [f"--kv-{name}" for name, value in overrides.items() if value is not None]
    if given:
        raise SpecError(f"{given[0]} needs --kv-bits; add for example --kv-bits 3")
    return None


def draft_spec(bits: str | None, draft_model: str | None) -> CacheSpec | None:
    """The spec of ``--draft-kv-bits``, or None without it.

    Raises:
        SpecError: for a bad value, or without ``--draft-model``.
    """
    if bits is None:
        return None
    if draft_model is None:
        raise SpecError("--draft-kv-bits needs --draft-model")
    return CacheSpec.parse(bits)


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The object in an option's text; empty without one.

    Raises:
        SpecError: if it is none.
    """
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{option} {text!r} is not JSON ({error}); "
            """give an object such as '{"enable_thinking": false}'"""
        ) from None
    if not isinstance(found, dict):
        raise SpecError(f"{option} {text!r} is not a JSON object")
    return found


def size(option: str, text: str | None) -> int | None:
    """Bytes in an option's text such as ``16GB`` (1e9 bytes each); None without one.

    Raises:
        SpecError: if it is no size.
    """
    if text is None:
        return None
    digits = text.upper().rstrip("KMGTB ")
    unit = text.upper()[len(digits) :].strip().removesuffix("B")
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError):
        raise SpecError(f"{option} {text!r} is no size; write one as 16GB") from None
