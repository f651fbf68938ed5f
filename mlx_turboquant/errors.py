"""Every error this package raises on purpose.

Owns the exception tree; raising is up to the module that notices.

    TurboQuantError
    |- SpecError (also ValueError)     an option's text or value is wrong
    |- FormatError (also ValueError)   a saved cache is foreign, damaged or newer
    `- UnsupportedError                the request is fine, we cannot do it
       |- RequestError                 a server's request, with its HTTP status
       |- UnsupportedModelError        this model's layers cannot take the cache
       `- BackendUnavailableError      the forced backend cannot take this call

Messages carry the value, the limit and the way out, on one line; `shown` keeps a value
from being all of it.
"""

from __future__ import annotations

import re

#: What a number or a text of thousands of characters is in a message.
_ENDLESS = re.compile(r"\S{300,}")


def _ends(word: re.Match[str]) -> str:
    return f"{word[0][:60]}...{word[0][-20:]}"


class TurboQuantError(Exception):
    """Base of all errors raised on purpose by ``mlx_turboquant``.

    Args:
        message: One line; of a word that is longer than any path only its ends stay.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_ENDLESS.sub(_ends, message))


class SpecError(TurboQuantError, ValueError):
    """A cache or codec option has a value outside its supported set."""


class FormatError(TurboQuantError, ValueError):
    """A prompt-cache file is unreadable, foreign, damaged or of a newer version."""


class UnsupportedError(TurboQuantError):
    """The request is well formed, but cannot be served.

    Args:
        reason: What cannot be done, with the offending value and the limit.
        remedy: What to do instead.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class UnsupportedModelError(UnsupportedError):
    """A model whose attention layers cannot use a compressed cache."""


class BackendUnavailableError(UnsupportedError):
    """The backend named by ``MLX_TQ_BACKEND`` cannot take a call."""


class RequestError(UnsupportedError):
    """A request to the server that cannot be answered.

    Args:
        reason: What cannot be done, with the offending value and the limit.
        remedy: What to do instead.
        status: The HTTP status that says so.
        param: The field of the request that is at fault, if it is one.
        code: A word that programs may test, such as ``model_not_found``.
        retry_after: Seconds after which it may be answered, if it may.
    """

    def __init__(
        self,
        reason: str,
        remedy: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(reason, remedy)
        self.status, self.param, self.code = status, param, code
        self.retry_after = retry_after


def shown(value: object) -> str:
    """A value as Python writes it, for an error; its middle left out if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"{type(value).__name__} of more digits than are written"
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"
