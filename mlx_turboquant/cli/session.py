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

from ..errors import SpecError, shown
from ..integrations import chat_template, loading, model_folder
from ..integrations.footprint import of_network
from ..memory import machine_memory, tight_memory_warning
from ..spec import CacheSpec
from . import options


class Session:
    """A model and its tokenizer, loaded as the command line asks.

    Attributes:
        name: The model's folder or hub id.
        adapter_path: Its adapters' folder, or None.
        network: The model.
        tokenizer: Its tokenizer, of mlx-lm's wrapper class.
        tokenizer_options: What the tokenizer was loaded with.
        template_options: Options of the chat template.
        quantize_activations: Whether its layers quantize what they are given.
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
        use_default_template: bool = False,
        quantize_activations: bool = False,
        seed: int | None = None,
        is_verbose: bool = True,
    ) -> None:
        if seed is not None:
            mx.random.seed(seed)
        self.name = options.DEFAULT_MODEL if model is None else model
        self.adapter_path = adapter_path
        self.template_options = template_options or {}
        self.quantize_activations = quantize_activations
        self.is_verbose = is_verbose
        self.tokenizer_options = {
            **(tokenizer_options or {}),
            "trust_remote_code": trust_remote_code,
        }
        self.network, self.tokenizer = self._load(adapter_path, trust_remote_code)
        eos_token = self.tokenizer_options.get("eos_token")
        self._add_ends([] if eos_token is None else [eos_token])
        self._add_ends(extra_eos_tokens)
        if use_default_template:
            chat_template.use_default(self.tokenizer)
        if is_verbose and mx.default_device().type == mx.DeviceType.cpu:
            typer.echo("On the CPU: weights are loaded as float32.", err=True)

    def _load(
        self, adapter_path: str | None, trust_remote_code: bool
    ) -> tuple[nn.Module, Any]:
        return loading.load(
            self.name,
            adapter_path=adapter_path,
            tokenizer_config=self.tokenizer_options,
            model_config={"quantize_activations": self.quantize_activations},
            trust_remote_code=trust_remote_code,
        )

    def _add_ends(self, tokens: Sequence[str]) -> None:
        """Let these tokens, or numbers of tokens, end a text.

        Raises:
            SpecError: for one that the model cannot write.
        """
        rows = model_folder.embedding_rows(self.network)
        vocabulary = self.tokenizer.get_vocab() if tokens else {}
        for token in tokens:
            options.checked_text("a token", token)
            is_number = token.isdecimal() and len(token) < 20
            number = int(token) if is_number else vocabulary.get(token)
            if number is None or (rows is not None and number >= rows):
                raise SpecError(
                    f"{shown(token)} is no token of this model; give one that "
                    f"is, or its number, 0..{(rows or len(vocabulary)) - 1}"
                )
            self.tokenizer.add_eos_token(str(number))

    def sampler(self, **choices: Any) -> Callable[[mx.array], mx.array]:
        """mlx-lm's sampler; XTC never cuts the ends of lines and texts.

        Args:
            choices: Those of ``mlx_lm.sample_utils.make_sampler``.

        Raises:
            SpecError: if it is to choose from more tokens than there are.
        """
        tokens = model_folder.embedding_rows(self.network) or 0
        for name, most in (("top_k", tokens - 1), ("min_tokens_to_keep", tokens)):
            if tokens and choices.get(name, 0) > most:
                option = name.replace("_", "-")
                raise SpecError(
                    f"--{option} {choices[name]} is above {most}: the model has "
                    f"{tokens} tokens"
                )
        kept_by_xtc = [*self.tokenizer.encode("\n"), *self.tokenizer.eos_token_ids]
        made: Callable[[mx.array], mx.array] = make_sampler(
            **choices, xtc_special_tokens=kept_by_xtc
        )
        return made

    def render(self, messages: chat_template.Messages, is_open: bool = False) -> str:
        """The chat template's text of ``messages``.

        Args:
            messages: Roles and contents, in the order of the chat.
            is_open: The last message goes on, so no answer is asked for.

        Raises:
            SpecError: if the template cannot.
        """
        write = chat_template.render_open if is_open else chat_template.render
        return write(self.tokenizer, messages, self.template_options)

    def render_turn(self, messages: list[dict[str, str]], is_open: bool) -> str:
        """The chat template's text from what the user says last on.

        Args:
            messages: As for `render`.
            is_open: As for `render`.

        Raises:
            SpecError: if the template cannot.
        """
        turn = max(i for i, said in enumerate(messages) if said["role"] == "user")
        return chat_template.render_from(
            self.tokenizer, messages, turn, self.template_options, is_open
        )

    def encode(self, text: str, is_rendered: bool = False) -> list[int]:
        """Tokens of a prompt.

        Args:
            text: The prompt.
            is_rendered: A chat template wrote it, with all special tokens in it.

        Raises:
            SpecError: if the text has no tokens.
            UnsupportedModelError: if the model has no embedding for one.
        """
        options.checked_text("the prompt", text)
        tokens = list(self.tokenizer.encode(text, add_special_tokens=not is_rendered))
        if not tokens:
            raise SpecError("the prompt has no tokens; give --prompt some text")
        model_folder.check_tokens(self.network, tokens, "the prompt")
        return tokens

    def tokens_left(self, seen: int, wanted: int) -> int:
        """Tokens that may be generated: as many as ``wanted``, within the context.

        Args:
            seen: Tokens of the text so far.
            wanted: Tokens to generate at most.
        """
        limit = loading.context_length(self.network)
        return wanted if limit is None else max(1, min(wanted, limit - seen))

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
