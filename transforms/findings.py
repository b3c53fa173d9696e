# SPDX-License-Identifier: Apache-2.0
"""What the measured quality of a model means: the few sentences an expert would say when shown the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# From here on something is worth saying.
_RECALL_LOST, _IMBALANCE = 0.02, 2.0
# A training set that is too small is learnt by heart; one that is of other vectors fits none.
_TOO_SMALL, _OTHERS = 1.2, 2.0
_GAIN = 1.05
# The last vectors of a source have an error that is so much above the mean, and not by chance.
_DRIFTED, _SIGMAS = 1.1, 3


def findings(quality: Mapping[str, Any]) -> list[str]:
    """Sentences about where recall is lost and what would bring it back, the costliest first."""
    at, rows = quality["at"], quality["recall"]
    best = rows[-1]["expected"]["10"]
    said: list[tuple[float, str]] = []
    lost = best - at["expected"]["10"]
    if "nprobes" in at and lost > _RECALL_LOST:
        row = next(row for row in rows if row["expected"]["10"] > best - _RECALL_LOST)
        text = f"{lost:.2f} of recall@10 is in lists that nprobes {at['nprobes']} does not visit"
        said.append((lost, f"{text}: nprobes {row['nprobes']} finds {row['expected']['10']:.2f}."))
    if 1 - best > _RECALL_LOST and quality["error"]["compared_by"] == "total":
        text = f"{1 - best:.2f} of recall@10 is lost in the codes, however many lists are searched"
        reach = (
            f" Rescoring ten times as many candidates reaches {rows[-1]['rescored']:.2f}." if "rescored" in at else ""
        )
        said.append((1 - best, f"{text}: a larger m makes finer ones.{reach}"))
    said += _about_the_sample(quality["error"])
    said += _about_drift(quality.get("drift"))
    if "lists" in quality and quality["lists"]["imbalance_factor"] > _IMBALANCE:
        factor = quality["lists"]["imbalance_factor"]
        said.append(
            (0.05, f"The lists are uneven: searches visit {factor:.1f} times the vectors that even lists would have.")
        )
    gain = quality.get("normalisation", {}).get("gain", 1.0)
    if gain > _GAIN:
        text = f"would make the error {gain:.1f} times as large."
        said.append((0.0, f"Training on vectors as they were read, not on unit vectors, {text}"))
    unused = sum(part["unused"] for part in quality.get("subquantizers", ()))
    if unused:
        said.append((0.01, f"{unused:,} codewords are used by no vector: bits that tell nothing apart."))
    return [text for _, text in sorted(said, key=lambda item: -item[0])]


def _about_the_sample(error: Mapping[str, Any]) -> list[tuple[float, str]]:
    if not {"training", "held_out"} <= set(error):
        return []
    name = error["compared_by"]
    before, after = error["training"][name], error["held_out"][name]
    ratio = after / before if before else 1.0
    if ratio < _TOO_SMALL:
        return []
    text = f"Vectors that were not trained on have {ratio:.1f} times the error of those that were"
    cause = "the training set is small" if ratio < _OTHERS else "they do not stand for the source"
    return [(ratio - 1, f"{text}: {cause}.")]


def _about_drift(drift: Mapping[str, Any] | None) -> list[tuple[float, str]]:
    if drift is None:
        return []
    last, chance = drift["error"][-1], drift["standard_error"][-1]
    if last < _DRIFTED or last - 1 < _SIGMAS * chance:
        return []
    text = f"The last vectors of the source have {last:.2f} times the mean error"
    return [(last - 1, f"{text}: it moves away from what the model knows, and what is written next will fit it less.")]
