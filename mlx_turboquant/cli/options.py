"""Options that several commands share: mlx-lm's names, then ours.

Owns help texts and defaults; `cache_spec` is where the KV options become a spec.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import SpecError
from ..spec import CENTERS, CODEC_NAMES, QUALITIES, CacheSpec

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
KvCodec = Annotated[str | None, typer.Option(help=f"Codec: {', '.join(CODEC_NAMES)}.")]
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


def cache_spec(
    bits: str | None,
    codec: str | None,
    window: int | None,
    sink: int | None,
    page: int | None,
    center: str | None,
    equalize: bool | None,
    seed: int | None,
    quality: str | None,
) -> CacheSpec | None:
    """The spec of ``--kv-bits`` and its companions, or None without it.

    Raises:
        SpecError: for a bad value, or a companion without ``--kv-bits``.
    """
    overrides = {
        "codec": codec,
        "window": window,
        "sink": sink,
        "page": page,
        "center": center,
        "equalize": equalize,
        "seed": seed,
        "quality": quality,
    }
    if bits is None and quality is not None:
        raise SpecError("--kv-quality needs --kv-bits auto")
    if bits is not None:
        return CacheSpec.parse(bits, **overrides)
    given = [f"--kv-{name}" for name, value in overrides.items() if value is not None]
    if given:
        raise SpecError(f"{given[0]} needs --kv-bits; add for example --kv-bits 3")
    return None
