"""What goes on in a model, for each thread that calls it.

Servers answer requests from several threads, and DataParallel runs a model's copies in threads of
their own: what a layer looks up has to be of the call that it is part of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_UNSET: Any = object()


def nothing() -> None:
    """What a thread begins with where it has nothing; torch.compile cannot trace `NoneType()`."""


class PerThread(Generic[T]):
    """A value that every thread has for itself. A copy or a pickle begins anew.

    Args:
        first: makes the value that a thread begins with.
    """

    def __init__(self, first: Callable[[], T]) -> None:
        self._first = first
        self._local = threading.local()

    def get(self) -> T:
        """This thread's."""
        value: T = getattr(self._local, "value", _UNSET)
        if value is _UNSET:
            value = self._local.value = self._first()
        return value

    def set(self, value: T) -> None:
        """Change this thread's."""
        self._local.value = value

    def __getstate__(self) -> dict[str, Any]:
        return {"_first": self._first}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_first"])  # type: ignore[misc]
