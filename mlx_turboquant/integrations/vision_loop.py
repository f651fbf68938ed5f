"""Loading and running a model through mlx-vlm, by its public functions alone.

What the commands call for ``--image``. What mlx-vlm's models are inside is `vision`'s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from mlx_lm.utils import MODEL_REMAPPING

from ..errors import SpecError, UnsupportedError, UnsupportedModelError
from ..regular import check_regular
from .loading import cast_for_device, check_adapters
from .model_folder import check_files, checked_name, first_line, read_config


@dataclass(frozen=True)
class Inputs:
    """A prompt with images, as a model's processor prepares it.

    Attributes:
        ids: Token ids (1, N), those that stand for images among them.
        given: What else ``mlx_vlm.stream_generate`` is given.
    """

    ids: mx.array
    given: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        """The ids as a list."""
        return cast(list[int], self.ids[0].tolist())


def is_installed() -> bool:
    """Whether there is an mlx-vlm to load models with."""
    return importlib.util.find_spec("mlx_vlm") is not None


def _check_installed() -> None:
    if not is_installed():
        raise UnsupportedError(
            "images need mlx-vlm, which is not installed",
            "pip install 'mlx-tq[vlm]'",
        )


def has_no_other(model: str) -> bool:
    """Whether mlx-vlm knows this model's type and mlx-lm does not.

    Args:
        model: A folder or a hub id; of the latter, ``config.json`` is downloaded.
    """
    try:
        folder = Path(model)
        if not folder.is_dir():
            folder = Path(hf_hub_download(model, "config.json")).parent
        config = read_config(folder)
    except (OSError, ValueError, HFValidationError, UnsupportedModelError):
        return False  # loading says what is wrong with it
    kind = config["model_type"]
    if "model_file" in config or _knows("mlx_lm", MODEL_REMAPPING.get(kind, kind)):
        return False
    return is_installed() and _knows("mlx_vlm", kind)


def _knows(package: str, kind: str) -> bool:
    try:
        return importlib.util.find_spec(f"{package}.models.{kind}") is not None
    except ImportError:  # of the part before a dot
        return False


def load(
    model: str, adapter_path: str | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Load ``(model, processor)``, float32 on a CPU as `loading.load` does.

    Raises:
        UnsupportedError: if mlx-vlm is not installed.
        UnsupportedModelError: if there is no such model or mlx-vlm cannot load it.
    """
    _check_installed()
    model = checked_name(model)
    from mlx_vlm import load as host_load
    from transformers import logging

    # mlx-vlm asks for this, in a variable that comes too late behind mlx-lm.
    logging.set_verbosity_error()
    check_files(Path(model), model)
    if adapter_path is not None:
        check_adapters(adapter_path)
    try:
        network, processor = host_load(
            model, adapter_path, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever is made of a stranger's files
        raise UnsupportedModelError(
            f"mlx-vlm cannot load model {model!r} ({first_line(error)})",
            "give a folder or a hub id of a vision model, such as "
            "'mlx-community/Qwen2.5-VL-3B-Instruct-4bit'",
        ) from error
    cast_for_device(network)
    return network, processor


def open_image(source: str) -> Any:
    """An image from a path, a URL or a data URI, as PIL has it.

    Raises:
        UnsupportedError: if mlx-vlm is not installed.
        SpecError: if it cannot be read.
    """
    _check_installed()
    from mlx_vlm.utils import load_image

    try:
        if not source.startswith(("data:", "http://", "https://")):
            check_regular(Path(source))
        return load_image(source)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error.__cause__ or error)
        first = reason.splitlines()[0]
        raise SpecError(f"--image {source!r} cannot be read ({first})") from error


def render(
    network: nn.Module,
    processor: Any,
    messages: list[dict[str, str]],
    images: int,
    options: dict[str, Any],
) -> str:
    """The chat template's text of ``messages``, with places for ``images``."""
    from mlx_vlm import apply_chat_template

    text: str = apply_chat_template(
        processor, network.config, messages, num_images=images, **options
    )
    return text


def inputs_of(
    network: nn.Module, processor: Any, text: str, images: Sequence[Any]
) -> Inputs:
    """What a model's processor makes of a text and its images.

    Raises:
        UnsupportedModelError: if the model takes no images.
        SpecError: if the text has no place for them.
    """
    from mlx_vlm import prepare_inputs
    from mlx_vlm.utils import should_add_special_tokens

    config = network.config
    if images and getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"models of type {config.model_type} take no images", "leave --image out"
        )
    try:
        prepared = dict(
            prepare_inputs(
                processor,
                images=list(images) or None,
                prompts=text,
                image_token_index=getattr(config, "image_token_index", None),
                add_special_tokens=should_add_special_tokens(
                    config.model_type, processor
                ),
            )
        )
    except (ValueError, IndexError) as error:  # each processor in its own words
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecError(
            f"the prompt and {len(images)} images do not go together ({first})"
        ) from error
    ids = prepared.pop("input_ids")
    inputs = Inputs(ids, {"mask": prepared.pop("attention_mask", None), **prepared})
    places = _image_ids(config, prepared)
    if images and places and not places.intersection(inputs.tokens):
        mark = getattr(processor, "image_token", None)
        raise SpecError(
            "the prompt has no place for the image; leave --ignore-chat-template out"
            + (f", or write {mark} where it belongs" if mark else "")
        )
    return inputs


def _image_ids(config: Any, prepared: dict[str, Any]) -> set[int]:
    """Ids that stand for an image, as config and processor call them."""
    names = ("image_token_id", "image_token_index", "media_placeholder_token_id")
    found = [getattr(config, name, None) for name in names]
    found += [prepared.get(name) for name in names]
    return {int(value) for value in found if isinstance(value, int)}


def stream(
    network: nn.Module,
    processor: Any,
    inputs: Inputs,
    eos_token_ids: Sequence[int],
    sampler: Callable[[mx.array], mx.array],
    **options: Any,
) -> Iterator[Any]:
    """mlx-vlm's responses, which have the fields of mlx-lm's.

    Args:
        network: The model.
        processor: Its processor.
        inputs: Of `inputs_of`.
        eos_token_ids: Tokens that end the text, beside those the model says.
        sampler: A token of logprobs (1, V).
        options: ``max_tokens``, ``prompt_cache``, ``prefill_step_size``.
    """
    from mlx_vlm import stream_generate

    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.stopping_criteria.add_eos_token_ids(list(eos_token_ids))
    yield from stream_generate(
        network,
        processor,
        "",
        input_ids=inputs.ids,
        sampler=sampler,
        **inputs.given,
        **options,
    )
