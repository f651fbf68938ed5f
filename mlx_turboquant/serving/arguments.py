"""From a request's fields to mlx-lm's arguments; the command has the defaults."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_lm.server import (
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)

from .fields import SamplingFields


def arguments_of(
    fields: SamplingFields,
    model: ModelDescription,
    default: argparse.Namespace,
    logprobs: bool | int | None = None,
) -> GenerationArguments:
    """What mlx-lm is told of a request, beside its text.

    Args:
        fields: The request's.
        model: What it names.
        default: The command's options, for what it leaves out.
        logprobs: Whether it asks for log probabilities, or of how many tokens.
    """
    top_logprobs = _or(fields.top_logprobs, -1)
    if logprobs is not None and not isinstance(logprobs, bool):
        top_logprobs = max(top_logprobs, logprobs)
    seed = None if fields.seed is None else fields.seed % 2**64
    max_tokens = fields.max_completion_tokens or fields.max_tokens
    return GenerationArguments(
        model=model,
        sampling=SamplingArguments(
            temperature=_or(fields.temperature, default.temp),
            top_p=_or(fields.top_p, default.top_p),
            top_k=_or(fields.top_k, default.top_k),
            min_p=_or(fields.min_p, default.min_p),
            xtc_probability=_or(fields.xtc_probability, 0.0),
            xtc_threshold=_or(fields.xtc_threshold, 0.1),
        ),
        logits=LogitsProcessorArguments(
            logit_bias=fields.logit_bias,
            repetition_penalty=_or(fields.repetition_penalty, 0.0),
            repetition_context_size=_or(fields.repetition_context_size, 20),
            presence_penalty=_or(fields.presence_penalty, 0.0),
            presence_context_size=_or(fields.presence_context_size, 20),
            frequency_penalty=_or(fields.frequency_penalty, 0.0),
            frequency_context_size=_or(fields.frequency_context_size, 20),
        ),
        stop_words=fields.stop_words(),
        max_tokens=max_tokens or default.max_tokens,
        num_draft_tokens=_or(fields.num_draft_tokens, default.num_draft_tokens),
        logprobs=logprobs is not None and logprobs is not False,
        top_logprobs=top_logprobs,
        seed=seed,
        chat_template_kwargs=None,
    )


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given
