# SPDX-License-Identifier: Apache-2.0
"""Patterns of model ids, for runs on a schedule: `products-{date}-{sha}` names a new model on each, and stands for all
of them where models are looked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from transforms.errors import RequestError

#: What a pattern may hold, and what each looks like in an id.
PLACEHOLDERS: Mapping[str, str] = {"date": "[0-9]{8}", "time": "[0-9]{6}", "sha": "[0-9a-f]{8}"}

_BRACES = re.compile(r"\{([^{}]*)\}|[{}]")


def expand(pattern: str, started: datetime, question: Mapping[str, Any]) -> str:
    """The id that `pattern` gives a run.

    Args:
      pattern: an id, in which `{date}` is the day as yyyymmdd, `{time}` the time as hhmmss and `{sha}` says what was
        asked.
      started: when the run began, in UTC.
      question: what decides the model beside the vectors: request, seed and the like; JSON values. The first 32 bits
        of its SHA-256, in hexadecimal, are `{sha}`. The model's own hash is not known before there is a model, and an
        id that is known beforehand is the same when a scheduler tries a failed run again.

    Raises:
      RequestError: a brace without its partner, or a placeholder that does not exist.
    """
    values: dict[str, Callable[[], str]] = {
        "date": lambda: f"{started:%Y%m%d}",
        "time": lambda: f"{started:%H%M%S}",
        "sha": lambda: hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8],
    }
    return _BRACES.sub(lambda found: values[_name(found, pattern)](), pattern)


def is_pattern(text: str) -> bool:
    """Whether `text` may stand for several ids; it can then not be the id of a model in files."""
    return any(character in text for character in "{}*")


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether an id is one that `pattern` gives; `*` stands for any characters. Raises RequestError as `expand`."""
    parts, end = [], 0
    for found in _BRACES.finditer(pattern):
        parts += [_literal(pattern[end : found.start()]), PLACEHOLDERS[_name(found, pattern)]]
        end = found.end()
    compiled = re.compile("".join([*parts, _literal(pattern[end:])]), re.DOTALL)
    return lambda model_id: compiled.fullmatch(model_id) is not None


def _literal(text: str) -> str:
    return ".*".join(re.escape(part) for part in text.split("*"))


def _name(found: re.Match[str], pattern: str) -> str:
    name = found.group(1)
    if name not in PLACEHOLDERS:
        known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
        raise RequestError(f"model_id {pattern!r} has {found.group()!r}, expected one of {known}")
    return name
