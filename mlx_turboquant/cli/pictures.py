"""`PictureSession`: a `Session` on a model of mlx-vlm's, for ``--image``.

Owns what differs for a command whose prompt has images: how the model is loaded, how
its prompt is made, and which options do not go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import SpecError
from ..integrations import vision_loop
from .session import Session


def refuse_options(**given: bool) -> None:
    """Refuse options that mlx-vlm's loop has nothing for.

    Args:
        given: By the option's name, whether it was given.

    Raises:
        SpecError: naming the first that was.
    """
    for name, is_given in given.items():
        if is_given:
            option = name.replace("_", "-")
            raise SpecError(
                f"--{option} does not go with --image, nor with a model that mlx-vlm "
                "alone can load; leave it out"
            )


class PictureSession(Session):
    """A model and its processor, loaded by mlx-vlm.

    Attributes:
        processor: What makes tokens and pixels of texts and images.
    """

    processor: Any

    def _load(
        self, adapter_path: str | None, trust_remote_code: bool
    ) -> tuple[nn.Module, Any]:
        network, self.processor = vision_loop.load(
            self.name, adapter_path, trust_remote_code
        )
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ends = getattr(tokenizer.stopping_criteria, "eos_token_ids", ())
        return network, TokenizerWrapper(tokenizer, eos_token_ids=ends)

    @property
    def has_chat_template(self) -> bool:
        """Whether the processor or its tokenizer says how a chat is written."""
        template = getattr(self.processor, "chat_template", None)
        return bool(template or self.tokenizer.has_chat_template)

    def inputs(
        self,
        text: str,
        images: Sequence[Any],
        system_prompt: str | None = None,
        is_plain: bool = False,
    ) -> vision_loop.Inputs:
        """Tokens and pixels of a prompt.

        Args:
            text: The prompt.
            images: Of `vision_loop.open_image`.
            system_prompt: For the chat template.
            is_plain: Leave the chat template out; the text has its own places for the
                images.
        """
        if self.has_chat_template and not is_plain:
            messages = [{"role": "user", "content": text}]
            if system_prompt is not None:
                messages.insert(0, {"role": "system", "content": system_prompt})
            text = vision_loop.render(
                self.network,
                self.processor,
                messages,
                len(images),
                self.template_options,
            )
        return vision_loop.inputs_of(self.network, self.processor, text, images)

    def stream(
        self,
        inputs: vision_loop.Inputs,
        sampler: Callable[[mx.array], mx.array],
        **options: Any,
    ) -> Iterator[Any]:
        """mlx-vlm's responses.

        Args:
            inputs: Of `inputs`.
            sampler: Of `sampler`.
            options: Those of `vision_loop.stream`.
        """
        return vision_loop.stream(
            self.network,
            self.processor,
            inputs,
            list(self.tokenizer.eos_token_ids),
            sampler,
            **options,
        )
