"""Which models, adapters and drafts a request may name.

What the server was started with, and what ``--allow-model`` lists; nothing else is
loaded, whatever folder or hub id a request names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_lm.server import ModelDescription

from ..errors import RequestError, SpecError, UnsupportedModelError
from ..integrations.footprint import folder_of
from ..integrations.model_folder import cannot_load, first_line, read_config
from .fields import DEFAULT_MODEL


def parse_allowed(texts: Sequence[str]) -> dict[str, str]:
    """Models by the names that requests may use, from ``--allow-model``.

    Args:
        texts: ``MODEL``, or ``NAME=MODEL`` for one under another name; ``MODEL`` may be
            ``default_model``, that of ``--model``.

    Raises:
        SpecError: if one is empty.
    """
    allowed: dict[str, str] = {}
    for text in texts:
        name, _, model = text.partition("=")
        if not name or (not model and "=" in text):
            raise SpecError(f"--allow-model {text!r} has no model; use NAME=MODEL")
        allowed[name] = model or name
    return allowed


def check_allowed(allowed: Mapping[str, str], model: str) -> None:
    """Make sure that listed models are there; of the hub's, configs are downloaded.

    Args:
        allowed: As `parse_allowed` gives it.
        model: What the server is started with, which is checked when it is loaded.

    Raises:
        SpecError: if one is not.
    """
    for name, to in allowed.items():
        if to in (DEFAULT_MODEL, model):
            continue
        try:
            read_config(folder_of(to))
            continue
        except UnsupportedModelError as error:
            reason = error.reason
        except Exception as error:  # whatever the hub's client makes of a name
            reason = cannot_load(to, first_line(error)).reason
        raise SpecError(
            f"--allow-model {name!r}: {reason}; name a folder with config.json, a hub "
            f"id, or {DEFAULT_MODEL}"
        )


class Names:
    """What requests may name.

    Args:
        model: What the server was started with.
        adapter: Its adapters, if it has any.
        draft: Its draft model, if it has one.
        allowed: Other models, by name.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None,
        draft: str | None,
        allowed: Mapping[str, str],
    ) -> None:
        self._adapter, self._draft = adapter, draft
        own = {DEFAULT_MODEL, model}
        if Path(model).is_dir():
            own.add(str(Path(model).resolve()))
        aliases = [name for name, to in allowed.items() if to in own]
        self._own = own.union(aliases)
        self._others = {n: to for n, to in allowed.items() if n not in self._own}
        #: What ``/v1/models`` lists, the model itself first.
        self.listed = [model, *aliases, *self._others]

    def resolve(
        self, model: str | None, adapter: str | None = None, draft: str | None = None
    ) -> ModelDescription:
        """What mlx-lm is to load for a request; one object for one thing.

        Raises:
            RequestError: with status 404 for anything else.
        """
        if adapter is not None and adapter != self._adapter:
            raise _unknown("adapters", adapter, [self._adapter])
        if draft is not None and draft not in (DEFAULT_MODEL, self._draft):
            raise _unknown("draft_model", draft, [self._draft])
        if model is None or model in self._own:
            return ModelDescription(DEFAULT_MODEL, DEFAULT_MODEL, None)
        if model not in self._others:
            raise _unknown("model", model, self.listed)
        return ModelDescription(self._others[model], DEFAULT_MODEL, None)


def _unknown(param: str, name: str, known: Sequence[str | None]) -> RequestError:
    shown = ", ".join(filter(None, known[:8])) or "none"
    return RequestError(
        f"{param} {name[:200]!r} is not served",
        f"known: {shown} (the server's --allow-model lists models)",
        status=404,
        param=param,
        code="model_not_found",
    )
