# SPDX-License-Identifier: Apache-2.0
"""Which request to train: a few are tried on one sample, and the one that serves best is put into the API's words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transforms.errors import RequestError, TrainingError
from transforms.gate import LeastRecall
from transforms.request import TrainingRequest
from transforms.versions import parse_version

#: Recall that may be given up for fewer nprobes.
_WORTH = 0.01

_MOST_LISTS = 16_384  # nlist must be below 20 000


@dataclass(frozen=True)
class Trial:
    """One request that was tried.

    Attributes:
      request: as it was trained.
      quality: from `quality.evaluate`, None if it failed.
      seconds: of training.
      error: why it failed.
    """

    request: TrainingRequest
    quality: Mapping[str, Any] | None
    seconds: float = 0.0
    error: str = ""

    @property
    def bytes_per_vector(self) -> float:
        assert self.quality is not None
        value: float = self.quality["memory"]["bytes_per_vector"]
        return value

    def most(self, k: int) -> float:
        """The largest recall@k, with whatever nprobes; 0 where there were too few vectors to measure it."""
        assert self.quality is not None
        return max(row["expected"].get(str(k), 0.0) for row in self.quality["recall"])

    def row(self, least: LeastRecall | None = None) -> Mapping[str, Any]:
        """The measured row with the fewest nprobes that reach `least`, or else about all that the codes can."""
        assert self.quality is not None
        k = 10 if least is None else least.k
        reached = least is not None and self.most(k) >= least.share
        bar = least.share if least is not None and reached else self.most(k) - _WORTH
        return next(row for row in self.quality["recall"] if row["expected"].get(str(k), 0.0) >= bar)


def candidates(request: TrainingRequest, count: int) -> list[TrainingRequest]:
    """A small grid around `request` for `count` vectors: its own method, and IVF with codes of several sizes.

    nlist is the power of two next to 2 sqrt(count), within what the vectors to train on suffice for.
    """
    trained = min(count, request.max_training_vector_count)
    nlist = 2 ** round(math.log2(2 * math.sqrt(count)))
    while nlist > 1 and (nlist > _MOST_LISTS or 39 * nlist > trained):
        nlist //= 2
    encoders: list[dict[str, Any] | None] = [None]
    if request.data_type == "float":
        encoders.append({"name": "sq", "parameters": {"type": "fp16"}})
        encoders += [{"name": "pq", "parameters": {"m": m, "code_size": 8}} for m in _sub_quantizers(request.dimension)]
    found = {request.index_description: request}
    for encoder in encoders:
        candidate = _with_method(request, nlist, encoder)
        if candidate.minimum_vectors <= trained:
            found.setdefault(candidate.index_description, candidate)
    return list(found.values())


def _sub_quantizers(dimension: int) -> list[int]:
    """Divisors of the dimension next to those that make codes 8, 16, 32 and 64 times smaller than floats."""
    divisors = [m for m in range(1, min(dimension, 1023) + 1) if dimension % m == 0]
    nearest = (min(divisors, key=lambda m: abs(math.log(m * part / dimension))) for part in (2, 4, 8, 16))
    return sorted(set(nearest), reverse=True)


def _with_method(request: TrainingRequest, nlist: int, encoder: Mapping[str, Any] | None) -> TrainingRequest:
    parameters: dict[str, Any] = {"nlist": nlist, "nprobes": 1}
    if encoder is not None:
        parameters["encoder"] = dict(encoder)
        if encoder["name"] == "sq" and parse_version(request.target_version) >= (3, 6, 0):
            parameters["encoder"] = {"name": "sq", "parameters": {"bits": 16}}
    return _parsed(request, parameters)


def _parsed(request: TrainingRequest, parameters: Mapping[str, Any], **more: Any) -> TrainingRequest:
    method = {"name": "ivf", "engine": "faiss", "space_type": request.space_type, "parameters": dict(parameters)}
    kept = {name: value for name, value in request.body().items() if name not in _RESOLVED}
    return TrainingRequest.from_fields(
        {**kept, "method": method, **more},
        target_version=request.target_version,
        require_index=False,
        require_field=False,
    )


_RESOLVED = ("method", "mode", "compression_level", "spaceType")


def best(trials: Sequence[Trial], least: LeastRecall | None, most_bytes: float | None) -> Trial:
    """The smallest trial that reaches `least`, or without it the one that finds most, within `most_bytes` a vector.

    Raises:
      TrainingError: none does; it says what comes nearest.
    """
    good = [trial for trial in trials if trial.quality is not None]
    if not good:
        raise TrainingError(f"nothing could be trained: {trials[0].error}")
    fit = [trial for trial in good if most_bytes is None or trial.bytes_per_vector <= most_bytes]
    if not fit:
        smallest = min(good, key=lambda trial: trial.bytes_per_vector)
        raise TrainingError(
            f"max_bytes_per_vector is {most_bytes:g}, but the smallest, {smallest.request.index_description}, takes "
            f"{smallest.bytes_per_vector:.1f}"
        )
    k = 10 if least is None else least.k
    if not any(trial.most(k) for trial in fit):
        raise TrainingError(f"min_recall is about recall@{k}, but there are too few vectors to measure it")
    most = max(fit, key=lambda trial: trial.most(k))
    if least is None:
        return most
    reach = [trial for trial in fit if trial.most(k) >= least.share]
    if not reach:
        raise TrainingError(
            f"min_recall is {least.share:g}@{least.k}, but the best, {most.request.index_description}, reaches "
            f"{most.most(k):.3f}"
        )
    return min(reach, key=lambda trial: trial.bytes_per_vector)


def ready(trial: Trial, least: LeastRecall | None) -> dict[str, Any]:
    """A Train API body for a trial, with its nprobes, and its compression_level where the API takes it."""
    request = trial.request
    nprobes = trial.row(least).get("nprobes")
    if nprobes is None:
        return request.body()
    parameters = {**request.model_definition["parameters"], "nprobes": nprobes}
    final = _parsed(request, parameters)
    try:
        level = {"compression_level": final.compression_level}
        if final.compression_level is not None and final.data_type == "float":
            _parsed(request, parameters, **level)
            return {**final.body(), **level}
    except RequestError:
        pass  # the API knows levels that it does not take
    return final.body()
