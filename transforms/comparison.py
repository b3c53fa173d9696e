# SPDX-License-Identifier: Apache-2.0
"""Is a new model worth its reindexing? The new and the old codebooks on the same held-out vectors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transforms.errors import RequestError
from transforms.request import TrainingRequest

#: Held-out vectors without which a comparison means nothing.
FEWEST_VECTORS = 100

# What must be equal for two models to be of one request: the fields of a model's description that decide its bytes.
_SAME_REQUEST = ("space_type", "dimension", "data_type", "model_definition")

# Bits a dimension of encoders that differ by them, where a model says nothing: sq was fp16 before it had any.
_DEFAULT_BITS = {"binary": 1, "sq": 16}


@dataclass(frozen=True)
class Previous:
    """The model to compare with.

    Attributes:
      model_id: of the model.
      path: a file with its blob; job graphs hold this and not the blob.
      error: of its own held-out vectors in its own time (`quality.quantization_error`), None if nobody measured it or
        if it was trained for another request: then a new model is trained in any case.
      least_gain: keep it unless the new model's error is smaller by this share; None to compare only.
    """

    model_id: str
    path: str
    error: float | None = None
    least_gain: float | None = None

    def still_good(self, error: float) -> str | None:
        """Why no new model is worth training, in words, or None.

        A new model of the same request comes out about as good on today's vectors as the old one was on those of its
        time. So there is nothing to gain where the old one's error has not grown.

        Args:
          error: of the old model on held-out vectors of today.
        """
        if self.least_gain is None or self.error is None or not error <= self.error * (1 + self.least_gain):
            return None
        return (
            f'model "{self.model_id}" is kept: its error is {error:.5g}, {_change(error, self.error)} than when it was '
            f"trained, and only_if_better is {self.least_gain:.3g}; nothing was trained"
        )

    def kept(self, old: float, new: float) -> str | None:
        """Why the old model is kept now that there is a new one, in words, or None."""
        if self.least_gain is None or not new >= old * (1 - self.least_gain):
            return None
        return (
            f'model "{self.model_id}" is kept: its error is {old:.5g}, that of a new model {new:.5g}, '
            f"{_change(new, old)}, and only_if_better is {self.least_gain:.3g}"
        )


def parse_gain(text: str) -> float:
    """`2%` or `0.02` as 0.02. Raises RequestError."""
    found = re.fullmatch(r"(\d*\.?\d+)(%?)", text)
    gain = float(found[1]) / (100 if found[2] else 1) if found else 1.0
    if not 0 <= gain < 1:
        raise RequestError(f"only_if_better is {text!r}, expected a share below 1, as 2% or 0.02")
    return gain


def own_error(description: Mapping[str, Any], new: Mapping[str, Any]) -> float | None:
    """The error of a model on held-out vectors of its time, from its `model.json`; None if it says nothing of use.

    Args:
      description: of the old model.
      new: of the new one: where the requests differ the error says nothing of what to expect.
    """
    if any(description.get(name) != new.get(name) for name in _SAME_REQUEST):
        return None
    measured = description.get("quality", {}).get("error", {})
    error: float | None = measured.get("held_out", {}).get(measured.get("compared_by"))
    return error


def check_comparable(description: Mapping[str, Any], request: TrainingRequest) -> None:
    """Raises RequestError unless errors of the old model and of one of `request` measure the same thing."""
    wanted = {"space_type": request.space_type, "dimension": request.dimension, "data_type": request.data_type}
    wanted["encoder"] = _encoder(request.model_definition)
    found = {**description, "encoder": _encoder(description["model_definition"])}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RequestError(
                f'compare_to: model "{description["model_id"]}" has {name} {found.get(name)}, this request {value}: '
                "their errors cannot be compared"
            )


def _encoder(definition: Mapping[str, Any]) -> str:
    """The encoder in a model definition, with its bits where an error is counted in them."""
    encoder = definition.get("parameters", {}).get("encoder", {"name": "flat"})
    name = encoder["name"]
    if name not in _DEFAULT_BITS:
        return str(name)
    return f"{name} of {encoder.get('parameters', {}).get('bits', _DEFAULT_BITS[name])} bits"


def _change(new: float, old: float) -> str:
    share = (new - old) / old if old else 0.0
    return f"{abs(share):.1%} {'larger' if share > 0 else 'smaller'}"
