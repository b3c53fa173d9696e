# SPDX-License-Identifier: Apache-2.0
"""Which of a schedule's models have had their time. Nothing here removes any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transforms.errors import RequestError
from transforms.model import CREATED, FAILED
from transforms.model_ids import matcher


@dataclass(frozen=True)
class Verdict:
    """What becomes of one model; without a `reason` to keep it, it goes."""

    model_id: str
    state: str
    timestamp: str
    reason: str


def verdicts(models: Sequence[Mapping[str, Any]], pattern: str, keep: int, used: Mapping[str, str]) -> list[Verdict]:
    """A verdict on each model whose id `pattern` gives, newest first.

    Kept are the `keep` newest created models; whatever is used, in training or in publication; and failed models that
    are newer than the newest created one, so that a failure is seen until the next success.

    Args:
      models: as the Get Model API describes them; `unfinished` marks one whose publication has not ended.
      used: model id to where it is used.

    Raises:
      RequestError: `keep` is below 1, or the pattern is wrong.
    """
    if keep < 1:
        raise RequestError(f"keep is {keep}, expected 1 or more")
    matches = matcher(pattern)
    found = sorted((model for model in models if matches(model["model_id"])), key=_age, reverse=True)
    created = 0
    result = []
    for model in found:
        state, done = model["state"], "unfinished" not in model
        created += state == CREATED and done
        if model["model_id"] in used:
            reason = f"used by {used[model['model_id']]}"
        elif not done:
            reason = "its publication is not finished"
        elif state == CREATED:
            reason = f"one of the {keep} newest" if created <= keep else ""
        elif state == FAILED:
            reason = "" if created else "nothing newer was created"
        else:
            reason = f"in state {state}"
        result.append(Verdict(model["model_id"], state, model["timestamp"], reason))
    return result


def newest(models: Sequence[Mapping[str, Any]], pattern: str) -> str | None:
    """The id of the newest created model whose id `pattern` gives; None if there is none. Raises RequestError."""
    matches = matcher(pattern)
    created = [model for model in models if model["state"] == CREATED and "unfinished" not in model]
    found = sorted((model for model in created if matches(model["model_id"])), key=_age)
    return found[-1]["model_id"] if found else None


def _age(model: Mapping[str, Any]) -> tuple[str, str]:
    # The plugin writes as many digits of a second as there are, and none if there are none: without the Z, text order
    # is the order of time.
    return model["timestamp"].removesuffix("Z"), model["model_id"]
