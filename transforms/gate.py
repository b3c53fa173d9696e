# SPDX-License-Identifier: Apache-2.0
"""What a model must reach to be kept. Knows no faiss: it reads what `quality.evaluate` measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transforms.errors import RequestError
from transforms.recall import DEPTHS, searched_with
from transforms.request import TrainingRequest

_RECALL = re.compile(r"(?P<share>\d*\.?\d+)@(?P<k>\d+)(?:/nprobes=(?P<nprobes>\d+))?")


@dataclass(frozen=True)
class LeastRecall:
    """Recall@`k` of at least `share` with `nprobes`, None for the request's own."""

    share: float
    k: int
    nprobes: int | None = None

    @classmethod
    def parse(cls, text: str) -> LeastRecall:
        """Reads `0.85@10` or `0.85@10/nprobes=16`. Raises RequestError."""
        found = _RECALL.fullmatch(text)
        if found is None:
            raise RequestError(
                f"min_recall is {text!r}, expected a share and a k, as 0.85@10, or with nprobes, as 0.85@10/nprobes=16"
            )
        share, k = float(found["share"]), int(found["k"])
        if not 0 < share <= 1:
            raise RequestError(f"min_recall is {text!r}, but a recall of {share:g} is not above 0 and at most 1")
        if k not in DEPTHS:
            raise RequestError(f"min_recall is {text!r}, but recall is measured at {' and '.join(map(str, DEPTHS))}")
        return cls(share, k, int(found["nprobes"]) if found["nprobes"] else None)


@dataclass(frozen=True)
class Gate:
    """The bars for a model; None where there is none.

    Attributes:
      recall: on the recall to expect in the whole source.
      imbalance: the largest `imbalance_factor` of the inverted lists.
    """

    recall: LeastRecall | None = None
    imbalance: float | None = None

    def __bool__(self) -> bool:
        return self.recall is not None or self.imbalance is not None

    def bars(self) -> list[str]:
        """The bars in words."""
        found = []
        if self.recall is not None:
            probes = "" if self.recall.nprobes is None else f" with nprobes {self.recall.nprobes}"
            found.append(f"recall@{self.recall.k} at least {self.recall.share:g}{probes}")
        if self.imbalance is not None:
            found.append(f"imbalance at most {self.imbalance:g}")
        return found

    @property
    def nprobes(self) -> tuple[int, ...]:
        """Values to measure for this gate."""
        return () if self.recall is None or self.recall.nprobes is None else (self.recall.nprobes,)

    def check(self, request: TrainingRequest) -> None:
        """Refuses bars that a model of `request` has no number for. Raises RequestError."""
        if self.imbalance is not None and not self.imbalance >= 1:
            raise RequestError(f"max_imbalance is {self.imbalance:g}, but lists of one size have 1")
        if request.nlist is None:
            if self.imbalance is not None:
                raise RequestError("max_imbalance is about the lists of ivf, but the method is hnsw")
            if self.nprobes:
                raise RequestError(f"min_recall has nprobes {self.nprobes[0]}, but the method is hnsw")
        elif self.nprobes and not 1 <= self.nprobes[0] <= request.nlist:
            raise RequestError(f"min_recall has nprobes {self.nprobes[0]}, expected 1 to nlist, {request.nlist}")

    def failures(self, quality: Mapping[str, Any] | None) -> list[str]:
        """Which bars the measured values miss, in words with both; none for a model that passes."""
        if quality is None:
            return ["there are too few vectors to measure what min_recall or max_imbalance is about"] if self else []
        found = []
        if self.recall is not None:
            found += self._recall_failures(self.recall, quality)
        if self.imbalance is not None and quality["lists"]["imbalance_factor"] > self.imbalance:
            factor, empty = quality["lists"]["imbalance_factor"], quality["lists"]["empty"]
            found.append(
                f"max_imbalance is {self.imbalance:g} but the lists have {factor:.2f} ({empty:,} of them are empty)"
            )
        return found

    def _recall_failures(self, bar: LeastRecall, quality: Mapping[str, Any]) -> list[str]:
        row = quality["at"]
        if bar.nprobes is not None:
            row = next(row for row in quality["recall"] if row["nprobes"] == bar.nprobes)
        value = row["expected"].get(str(bar.k))
        if value is None:
            return [
                f"min_recall is about recall@{bar.k}: {quality['vectors']['base']} vectors are too few to measure it"
            ]
        if value >= bar.share:
            return []
        return [f"min_recall is {bar.share:g}@{bar.k} but recall@{bar.k} is {value:.3f} with {searched_with(row)}"]
