"""`Session`: a loaded model, and what every command does before it reads a text.

Owns the steps that generate, chat, cache_prompt and eval share: loading, the seed, the
sampler, the chat template, and the checks of context and memory. Imports MLX, so
commands import it only when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.sample_utils import make_sampler

from ..errors import SpecError
from ..integrations import loading
from ..integrations.footprint import of_network
from ..memory import machine_memory, tight_memory_warning
from ..spec import CacheSpec
from .options import DEFAULT_MODEL


class Session:
    """A model and its tokenizer, loaded as the command line asks.

    Attributes:
        name: The model's folder or hub id.
        network: The model.
        tokenizer: Its tokenizer, of mlx-lm's wrapper class.
        tokenizer_options: What the tokenizer was loaded with.
        template_options: Options of the chat template.
        is_verbose: Whether notes and warnings go to stderr.

    Raises:
        UnsupportedModelError: if there is no such model or mlx-lm cannot load it.
    """

    def __init__(
        self,
        model: str | None,
        adapter_path: str | None = None,
        trust_remote_code: bool = False,
        *,
        tokenizer_options: dict[str, Any] | None = None,
        extra_eos_tokens: Sequence[str] = (),
        template_options: dict[str, Any] | None = None,
        seed: int | None = None,
        is_verbose: bool = True,
    ) -> None:
        if seed is not None:
            mx.random.seed(seed)
        self.name = model or DEFAULT_MODEL
        self.template_options = template_options or {}
        self.is_verbose = is_verbose
        self.tokenizer_options = {
            **(tokenizer_options or {}),
            "trust_remote_code": trust_remote_code,
        }
        self.network, self.tokenizer = self._load(adapter_path, trust_remote_code)
        if is_verbose and mx.default_device().type == mx.DeviceType.cpu:
            typer.echo("On the CPU: weights are loaded as float32.", err=True)
        for token in extra_eos_tokens:
            self.tokenizer.add_eos_token(token)

    def _load(
        self, adapter_path: str | None, trust_remote_code: bool
    ) -> tuple[nn.Module, Any]:
        return loading.load(
            self.name,
            adapter_path=adapter_path,
            tokenizer_config=self.tokenizer_options,
            trust_remote_code=trust_remote_code,
        )

    def sampler(self, **options: Any) -> Callable[[mx.array], mx.array]:
        """mlx-lm's sampler; XTC never cuts the ends of lines and texts.

        Args:
            options: Those of ``mlx_lm.sample_utils.make_sampler``.
        """
        kept_by_xtc = [*self.tokenizer.encode("\n"), *self.tokenizer.eos_token_ids]
        made: Callable[[mx.array], mx.array] = make_sampler(
            **options, xtc_special_tokens=kept_by_xtc
        )
        return made

    def render(self, messages: list[dict[str, str]], is_open: bool = False) -> str:
        """The chat template's text of ``messages``.

        Args:
            messages: Roles and contents, in the order of the chat.
            is_open: The last message goes on, so no answer is asked for.
        """
        text: str = self.tokenizer.apply_chat_template(
            messages,
            **{
                "tokenize": False,
                "continue_final_message": is_open,
                "add_generation_prompt": not is_open,
                **self.template_options,
            },
        )
        return text

    def encode(self, text: str, is_rendered: bool = False) -> list[int]:
        """Tokens of a prompt.

        Args:
            text: The prompt.
            is_rendered: A chat template wrote it, with all special tokens in it.

        Raises:
            SpecError: if the text has no tokens.
        """
        tokens = list(self.tokenizer.encode(text, add_special_tokens=not is_rendered))
        if not tokens:
            raise SpecError("the prompt has no tokens; give --prompt some text")
        return tokens

    def check_context(self, tokens: int, **wording: str) -> None:
        """Make sure that a text is no longer than the model was made for.

        Args:
            tokens: Of the whole text.
            wording: ``subject`` and ``remedy`` of the error, as `loading.check_context`
                has them.

        Raises:
            UnsupportedError: if it is longer.
        """
        loading.check_context(self.network, tokens, **wording)

    def warn_if_tight(
        self, tokens: int, spec: CacheSpec | None, caches: list[Any] | None = None
    ) -> None:
        """Say so on stderr if the caches of a text will not fit in this machine.

        ``caches`` made for it already know the model's shapes.
        """
        if not self.is_verbose:
            return
        warning = tight_memory_warning(
            of_network(self.network, entries=getattr(caches, "entries", None) or None),
            tokens,
            spec,
            machine_memory(),
        )
        if warning is not None:
            typer.echo(f"warning: {warning}", err=True)
