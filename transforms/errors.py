# SPDX-License-Identifier: Apache-2.0
"""The ways a run can end badly. All are shown to users as one line, without a stack trace."""

from __future__ import annotations


class RequestError(ValueError):
    """The request, a flag or the source's mapping is wrong; nothing was done. Exit code 2."""


class TrainingError(RuntimeError):
    """The request was good but the run failed. Exit code 1."""


class StorageError(TrainingError, OSError):
    """A file or a folder cannot be read, written or listed; the message says which and why."""
