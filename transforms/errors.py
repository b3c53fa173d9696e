# SPDX-License-Identifier: Apache-2.0
"""The two ways a run can end badly. Both are shown to users as one line, without a stack trace."""

from __future__ import annotations


class RequestError(ValueError):
    """The request, a flag or the source's mapping is wrong; nothing was done. Exit code 2."""


class TrainingError(RuntimeError):
    """The request was good but the run failed. Exit code 1."""
