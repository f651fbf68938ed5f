"""A chat in a prompt-cache file: its messages and tokens beside its cache.

Owns what of such a file is a chat's, and the checks that it is this model's. The file
itself is ``prompt_files.py``'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import FormatError
from .model_folder import check_tokens
from .model_identity import is_same, metadata_of
from .prompt_files import load_prompt_cache, save_prompt_cache
from .stock import length_of

_KIND = "mlx_turboquant chat"


@dataclass(frozen=True)
class SavedChat:
    """What a file has of a chat.

    Attributes:
        messages: Roles and contents, in the order of the chat.
        tokens: Its text, with the answers as the model wrote them.
        held: Those that the cache has seen: the text's beginning.
        cache: The prompt cache.
    """

    messages: list[dict[str, str]]
    tokens: list[int]
    held: list[int]
    cache: list[Any]


def save_chat(
    path: str | Path, chat: SavedChat, name: str, adapter: str | None
) -> None:
    """Write a chat to a prompt-cache file.

    Args:
        path: The file.
        chat: The chat.
        name: The model's folder or hub id.
        adapter: The folder of adapters that it was loaded with, or None.

    Raises:
        SpecError: if there can be no such file.
    """
    mx.eval([cache.state for cache in chat.cache])
    save_prompt_cache(
        path,
        chat.cache,
        {
            "kind": _KIND,
            **metadata_of(name, adapter),
            "messages": json.dumps(chat.messages),
            "held": json.dumps(chat.held),
            "tokens": json.dumps(chat.tokens),
        },
    )


def load_chat(
    path: str | Path, network: nn.Module, name: str, adapter: str | None
) -> SavedChat:
    """Read what `save_chat` wrote.

    Args:
        path: The file.
        network: The model that will go on from it.
        name: As for `save_chat`.
        adapter: As for `save_chat`.

    Raises:
        FormatError: if it is none, or of another model.
        UnsupportedModelError: if the cache is another model's.
        UnsupportedError: if this is one machine of several.
    """
    cache, metadata = load_prompt_cache(path, network, return_metadata=True)
    if metadata.get("kind") != _KIND:
        raise FormatError(
            f"{path} is a prompt cache but no chat; use --prompt-cache-file of "
            "mlx_tq.generate"
        )
    if not is_same(metadata, name, adapter):
        raise FormatError(
            f"{path} is a chat with {metadata.get('model')!r}, not {name!r} "
            "as it is here; start mlx_tq.chat with that model"
        )
    seen = length_of(cache)
    messages, held, tokens = _said(metadata, str(path))
    if held != tokens[: len(held)] or seen not in (None, len(held)):
        raise FormatError(
            f"{path} is damaged: {len(held)} tokens are said to be in a cache of "
            f"{seen}; its chat cannot go on"
        )
    check_tokens(network, tokens, str(path))
    return SavedChat(messages, tokens, held, cache)


def _said(
    metadata: dict[str, str], path: str
) -> tuple[list[dict[str, str]], list[int], list[int]]:
    """Messages, tokens that the cache has seen and all tokens, of a saved chat.

    Raises:
        FormatError: if they are something else.
    """
    try:
        messages, held, tokens = (
            json.loads(metadata[name]) for name in ("messages", "held", "tokens")
        )
        are_tokens = all(
            isinstance(ids, list) and all(type(token) is int for token in ids)
            for ids in (held, tokens)
        )
        are_messages = isinstance(messages, list) and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in messages
        )
    except (KeyError, ValueError, RecursionError):
        are_tokens = are_messages = False
    if not (are_tokens and are_messages):
        raise FormatError(f"{path} is damaged: its messages or tokens are none")
    return messages, held, tokens
