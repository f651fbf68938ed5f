"""`Mark`: what a check leaves on disk while it runs, to tell what ended it.

Whoever holds the store's lock and finds a mark knows that its writer is gone: the lock
of a process that ended is free. Pids, which are used again, and clocks, which are set,
are not asked.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Checks that may end with the process that waits for them, before the kernels are
#: blamed: a check that takes its parent along must not be tried for ever.
ATTEMPTS = 2
_LINUX_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Mark:
    """A check that is under way, or was.

    Attributes:
        boot: Which start of the machine it began in, as `this_boot`.
        attempt: 1 for the first; later ones follow processes that were ended.
    """

    boot: str
    attempt: int = 1

    @classmethod
    def of(cls, fields: dict[str, Any] | None) -> Mark | None:
        """From JSON.

        Raises:
            KeyError, TypeError, ValueError: if it is no mark.
        """
        if fields is None:
            return None
        return cls(str(fields["boot"]), int(fields["attempt"]))

    @property
    def blame(self) -> str:
        """Why kernels are blamed for it, in words; "" if they are not."""
        if self.boot != this_boot():
            return "the machine went down during an earlier check"
        if self.attempt >= ATTEMPTS:
            return f"{self.attempt} checks ended with the process that waited for them"
        return ""


#: Of a version that did not say which start of the machine it was.
UNKNOWN_BOOT = Mark("before marks had a boot")


@functools.cache
def this_boot() -> str:
    """A name of this start of the machine; "" where the system gives it none."""
    if sys.platform == "darwin":
        return _sysctl(b"kern.bootsessionuuid")
    try:
        return _LINUX_BOOT.read_text().strip()
    except OSError:
        return ""


def _sysctl(name: bytes) -> str:
    """A text that macOS knows, without starting a process; "" if it does not."""
    try:
        call: Any = ctypes.CDLL(None).sysctlbyname
    except (OSError, AttributeError):
        return ""
    text = ctypes.create_string_buffer(64)
    size = ctypes.c_size_t(len(text))
    failed = call(name, text, ctypes.byref(size), None, ctypes.c_size_t(0))
    return "" if failed else text.value.decode(errors="replace")
