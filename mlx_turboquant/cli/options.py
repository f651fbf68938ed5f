"""Options that several commands share: mlx-lm's names, then ours.

Owns help texts and defaults; `cache_spec` is where the KV options become a spec.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from ..errors import SpecError, shown
from ..spec import QUALITIES, CacheSpec

DEFAULT_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"  # as in mlx-lm

#: MLX counts an axis in 32 bits; texts are shorter.
MOST_TOKENS = 2**31 - 1
#: Far above it all tokens are as likely as one another, and infinity leaves no numbers.
_MOST_TEMP = 1000
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
Image = Annotated[
    list[str] | None,
    typer.Option(
        help="A path or URL of an image in the prompt, once for each; the model is "
        "loaded by mlx-vlm (the extra vlm)."
    ),
]
PrefillResponse = Annotated[
    str | None, typer.Option(help="Start of the answer, for the chat template.")
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        "-m",
        min=1,
        max=MOST_TOKENS,
        help="Tokens to generate at most; the model's context ends it, too.",
    ),
]
Temp = Annotated[
    float, typer.Option(min=0, max=_MOST_TEMP, help="Sampling temperature.")
]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sampling top-p.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Sampling min-p.")]
TopK = Annotated[int, typer.Option(min=0, max=MOST_TOKENS, help="Sampling top-k.")]
XtcProbability = Annotated[
    float, typer.Option(min=0, max=1, help="Chance of XTC sampling per token.")
]
XtcThreshold = Annotated[
    float, typer.Option(min=0, max=0.5, help="Probability XTC cuts above.")
]
MinTokensToKeep = Annotated[
    int, typer.Option(min=1, max=MOST_TOKENS, help="Kept by min-p sampling.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of the sampler.")
]
IgnoreChatTemplate = Annotated[
    bool, typer.Option(help="Use the prompt as it is, without a chat template.")
]
UseDefaultChatTemplate = Annotated[
    bool, typer.Option(help="Use the tokenizer class's template if it has none.")
]
ChatTemplateConfig = Annotated[
    str | None, typer.Option(help="JSON options for the chat template.")
]
Verbose = Annotated[
    str, typer.Option(help="'False' or 'F' prints the answer and nothing else.")
]
MaxKvSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Keep only so many tokens, the first 4 among them.",
    ),
]
PrefillStepSize = Annotated[
    int,
    typer.Option(min=1, max=MOST_TOKENS, help="Prompt tokens processed at a time."),
]
PromptCacheFile = Annotated[
    str | None, typer.Option(help="Go on from a cache saved by save_prompt_cache.")
]
DraftModel = Annotated[
    str | None, typer.Option(help="A smaller model for speculative decoding.")
]
NumDraftTokens = Annotated[
    int, typer.Option(min=1, max=1024, help="Tokens drafted at a time.")
]
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
        "by layer), or auto (see --kv-quality). Rare options (window, sink, page, "
        "center, equalize, seed) follow with commas: 3,window=64 or 3,sink=8,seed=1. "
        "Default: no compression."
    ),
]
#: The codecs to choose from without reading docs/codecs.md; the first is the default.
KV_CODECS = ("turboquant", "trellis", "rotated-int4")
KvCodec = Annotated[
    str | None,
    typer.Option(
        help=f"Codec: {', '.join(KV_CODECS)} (default: {KV_CODECS[0]}), or "
        "research.NAME, as in docs/codecs.md."
    ),
]
KvQuality = Annotated[
    str | None,
    typer.Option(
        help=f"For --kv-bits auto: {', '.join(QUALITIES)} (default: balanced)."
    ),
]
QuantizeActivations = Annotated[
    bool,
    typer.Option(
        "--quantize-activations",
        "-qa",
        help="Quantize activations as the weights of each layer are (nvfp4 or mxfp8).",
    ),
]
#: Of mlx-lm's own quantization, for an error that says what takes their place.
GroupSize = Annotated[
    str | None, typer.Option("--kv-group-size", hidden=True, help="mlx-lm's.")
]
QuantizedKvStart = Annotated[
    str | None, typer.Option("--quantized-kv-start", hidden=True, help="mlx-lm's.")
]

#: What `template_options` may not change: commands read what a template makes.
_SET_BY_COMMANDS = (
    *("tokenize", "add_generation_prompt", "continue_final_message", "messages"),
    *("conversation", "chat_template", "return_dict", "return_tensors"),
)
#: Bytes that no machine has; above it numbers are typing errors.
_MOST_BYTES = 10**18
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_spec(
    kv_bits: str | None, kv_codec: str | None, kv_quality: str | None
) -> CacheSpec | None:
    """The spec that the three ``--kv`` options say, or None without ``--kv-bits``.

    Raises:
        SpecError: for a bad value, or a companion that --kv-bits has no use for.
    """
    if kv_bits is not None:
        if kv_quality not in (None, *QUALITIES):
            names = ", ".join(QUALITIES)
            raise SpecError(f"--kv-quality {kv_quality} is none of {names}")
        spec = CacheSpec.parse(kv_bits, codec=kv_codec)
        if kv_quality is not None and spec.quality is None:
            raise SpecError(
                f"--kv-quality is for --kv-bits auto, and --kv-bits {kv_bits} says how "
                "many; write --kv-bits auto, or leave --kv-quality out"
            )
        return CacheSpec.parse(spec, quality=kv_quality)
    if kv_quality is not None:
        raise SpecError("--kv-quality needs --kv-bits auto")
    if kv_codec is not None:
        raise SpecError("--kv-codec needs --kv-bits; add for example --kv-bits 3")
    return None


def refuse_replaced(group_size: str | None, quantized_kv_start: str | None) -> None:
    """Refuse options of mlx-lm's quantization that have no place in this one.

    Raises:
        SpecError: saying what takes the place of the first that was given.
    """
    if group_size is not None:
        raise SpecError(
            "--kv-group-size has no place here: a vector is rotated and has one "
            "scale, not one for each group; leave it out (bits are --kv-bits')"
        )
    if quantized_kv_start is not None:
        raise SpecError(
            "--quantized-kv-start has no place here: codes are made page by page from "
            "the start, and sink= and window= in --kv-bits say which tokens stay as "
            "they are; leave it out, or write --kv-bits 3,window=1024"
        )


def draft_spec(bits: str | None, draft_model: str | None) -> CacheSpec | None:
    """The spec of ``--draft-kv-bits``, or None without it.

    Raises:
        SpecError: for a bad value, or if there is no ``--draft-model``.
    """
    if bits is None:
        return None
    if draft_model is None:
        raise SpecError("--draft-kv-bits needs --draft-model")
    return CacheSpec.parse(bits)


def prompt_text(prompt: str, may_be_empty: bool = False) -> str:
    """The prompt itself, or all of stdin for ``-``.

    Raises:
        SpecError: if it is not UTF-8, stdin is closed, or there is no text and
            ``may_be_empty`` is False.
    """
    text = checked_text("--prompt", prompt)
    if prompt == "-":
        if sys.stdin is None:
            raise SpecError("stdin is closed; give --prompt some text")
        # Some editors and shells begin UTF-8 with a mark of the byte order.
        text = checked_text("stdin", sys.stdin.read()).removeprefix("\ufeff")
    if not text and not may_be_empty:
        raise SpecError("the prompt is empty; give --prompt some text, or - for stdin")
    return text


def checked_text(source: str, text: str) -> str:
    """The text, if it was UTF-8: tokenizers take nothing else.

    Args:
        source: What it came from, for the error.
        text: As Python decodes what is not UTF-8: bytes as lone surrogates.

    Raises:
        SpecError: naming the first byte that is not, and what may be meant.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # In this range it stands for a byte (PEP 383).
        found = f"byte {code - 0xDC00:#x}" if 0xDC80 <= code <= 0xDCFF else f"{code:#x}"
        encoding = (
            "utf-16" if text[:2] in ("\udcff\udcfe", "\udcfe\udcff") else "latin1"
        )
        raise SpecError(
            f"{source} is not UTF-8 ({found} at character {error.start}); convert it, "
            f"as with iconv -f {encoding} -t utf-8"
        ) from None
    return text


def template_options(option: str, text: str | None) -> dict[str, Any]:
    """Options of the chat template; empty without any.

    Raises:
        SpecError: as `json_object`, or for one that the command itself sets.
    """
    options = json_object(option, text)
    for name in _SET_BY_COMMANDS:
        if name in options:
            raise SpecError(
                f"{option} sets {name}, which the command decides; leave it out"
            )
    return options


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The object in an option's text; empty without one.

    Raises:
        SpecError: if the text is not JSON, or JSON but no object.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"{option} {shown(text)} is not JSON ({error}); "
            """give an object such as '{"enable_thinking": false}'"""
        ) from None
    if not isinstance(value, dict):
        raise SpecError(f"{option} {shown(text)} is not a JSON object")
    return value


def size(option: str, text: str | None, least: int = 0) -> int | None:
    """Bytes in an option's text such as ``16GB`` (1e9 bytes each); None without one.

    Raises:
        SpecError: if the text is not a number with a unit or none, or is below
            ``least`` or above what any machine has.
    """
    if text is None:
        return None
    digits = text.upper().rstrip("KMGTB ")
    unit = text.upper()[len(digits) :].strip().removesuffix("B")
    try:
        count = float(digits) * _UNITS[unit]
        number = int(count) if count <= _MOST_BYTES else _MOST_BYTES + 1
    except (ValueError, KeyError, OverflowError):
        raise SpecError(
            f"{option} {shown(text)} is no size; write one as 16GB"
        ) from None
    if not least <= number <= _MOST_BYTES:
        raise SpecError(
            f"{option} {shown(text)} is outside {least}..1e18 bytes; write it as 16GB"
        )
    return number
