# SPDX-License-Identifier: Apache-2.0
"""Where the steps say how far they are, and where they are told to stop.

On remote workers progress goes to the log; a program that runs the steps in its own process may listen, and may
cancel them: each of them speaks up every few megabytes or iterations, and finds out then.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from transforms.errors import TrainingError

_LOG = logging.getLogger("knn_train")
_cancelled = threading.Event()


class Listener(Protocol):
    """May be called from several threads."""

    def advance(self, stage: str, amount: int) -> None:
        """`amount` more of `stage` is done; nobody knows here of how much."""

    def report(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are done."""


class _Log:
    def advance(self, stage: str, amount: int) -> None:
        return None

    def report(self, stage: str, done: int, total: int) -> None:
        _LOG.info("%s: %d of %d", stage, done, total)


_listener: Listener = _Log()


def listen(listener: Listener | None) -> None:
    """Sends what the steps in this process say to `listener`; None for the log again. Takes back a `cancel`."""
    global _listener
    _listener = listener or _Log()
    _cancelled.clear()


def cancel() -> None:
    """Makes the steps in this process raise TrainingError the next time they say something."""
    _cancelled.set()


def cancelled() -> bool:
    """Whether `cancel` was called since the last `listen`."""
    return _cancelled.is_set()


def advance(stage: str, amount: int) -> None:
    _stop_if_cancelled()
    _listener.advance(stage, amount)


def report(stage: str, done: int, total: int) -> None:
    _stop_if_cancelled()
    _listener.report(stage, done, total)


def _stop_if_cancelled() -> None:
    if cancelled():
        raise TrainingError("interrupted")
