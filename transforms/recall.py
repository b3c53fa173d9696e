# SPDX-License-Identifier: Apache-2.0
"""Recall: how many of the true nearest neighbours a search finds, and what that becomes in a larger index.

Plain numpy. An index can be tried with the vectors that are in memory only, but neighbours lie closer together among
a hundred times as many, and codes that told them apart no longer do: on clustered vectors recall@10 of one model went
from 0.68 among 12 500 vectors to 0.23 among 400 000. `expected` says what to expect there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: The k of recall@k.
DEPTHS = (10, 100)

#: Depths at which a curve of recall is measured.
CURVE = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 80, 100)

# Two distances that differ by less, relatively, are one: of duplicates it does not matter which is found.
_SAME = 1e-6


def searched_with(row: Mapping[str, Any]) -> str:
    """How an entry of a model's `recall` was searched, in words."""
    return f"nprobes {row['nprobes']}" if "nprobes" in row else f"ef_search {row['ef_search']}"


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The exact nearest neighbours of some queries among `rows` vectors, nearest first.

    Attributes:
      distances: (queries, depth) float32, smaller is nearer.
      ids: (queries, depth) int64, below `rows`.
      rows: how many vectors were searched.
    """

    distances: np.ndarray
    ids: np.ndarray
    rows: int

    def distances_of(self, found: np.ndarray) -> np.ndarray:
        """The exact distance of each of (queries, n) ids; infinite for -1 and beyond the depth."""
        offset = np.arange(len(self.ids), dtype=np.int64)[:, None] * self.rows
        known = (self.ids + offset).ravel()
        order = np.argsort(known)
        keys = (found + offset).ravel()
        place = order[np.minimum(np.searchsorted(known, keys, sorter=order), len(order) - 1)]
        hit = (known[place] == keys) & (found.ravel() >= 0)
        return np.where(hit, self.distances.ravel()[place], np.float32(np.inf)).reshape(found.shape)

    def recall(self, distances: np.ndarray, k: int, among: int | None = None) -> np.ndarray:
        """(queries,) float64: the share of the `k` nearest neighbours that is among the first `among` found.

        A vector that is as near as the k-th neighbour counts as one of them.

        Args:
          distances: (queries, n), what `distances_of` gave for the ids found, in the order they were found.
          among: `k` if not given.
        """
        limit = self.distances[:, k - 1 : k]
        near = distances[:, : among or k] <= limit + _SAME * np.abs(limit)
        return np.minimum(near.sum(axis=1), k) / k


def curve_of_halves(true: Neighbours, found: np.ndarray, distances: np.ndarray) -> dict[int, float]:
    """Mean recall at the depths of CURVE in either half of the base, as far as all queries have neighbours there.

    The base is in no order, so even and odd ids are two uniform samples of it. What a search finds among them is what
    it finds in all, less the rest: codes and lists are the same.

    Args:
      found: (queries, n) ids in the order they were found; -1 for none.
      distances: (queries, n), their exact distances.
    """
    halves = []
    for odd in (0, 1):
        own = true.ids % 2 == odd
        depth = int(own.sum(axis=1).min())
        at = np.argsort(~own, axis=1, kind="stable")[:, :depth]
        half = Neighbours(np.take_along_axis(true.distances, at, 1), np.take_along_axis(true.ids, at, 1), true.rows)
        other = found % 2 != odd
        order = np.argsort(other, axis=1, kind="stable")[:, :depth]
        own_distances = np.where(other, np.float32(np.inf), distances)
        ordered = np.take_along_axis(own_distances, order, 1)
        halves.append({k: float(half.recall(ordered, k).mean()) for k in CURVE if k <= depth})
    return {k: (share + halves[1][k]) / 2 for k, share in halves[0].items() if k in halves[1]}


def expected(curve: Mapping[int, float], halves: Mapping[int, float], k: int, growth: float, samples: int) -> float:
    """Recall@k to expect among `growth` times as many vectors.

    What a search confuses depends on how far away neighbours are, and the k nearest of many vectors lie as far away
    as the k / growth nearest of a uniform sample of them. So recall@k there is about recall@(k / growth) here. Between
    measured depths it is interpolated over log k; before the first the log-odds between recall@1 and recall@2 are
    prolonged.

    A sample blurs: how many of its vectors stand for the k nearest varies, with a standard deviation of the order of
    sqrt(growth / k) of their number, and where k is the size of clusters recall has an edge there. What the blur costs
    grows as its width does, and halves of the base, where `growth` is twice as large, show how much that is.
    tests/benchmarks/README.md says how far off the outcome was.

    Args:
      curve: recall at increasing depths from 1 on.
      halves: the same in halves of the base; may be empty.
      samples: queries it was measured with; keeps 0 and 1 off infinity.
    """
    growth = max(growth, 1.0)
    share = _at_depth(curve, k / growth, samples)
    # Below depth 1 halves would show what prolonging the curve costs, which is something else.
    if 1 <= k / (2 * growth) <= max(halves, default=0):
        blurred = share - _at_depth(halves, k / (2 * growth), samples)
        share += blurred * (1 - growth**-0.5) / (math.sqrt(2) - 1)
    return min(1.0, max(0.0, share))


def _at_depth(curve: Mapping[int, float], depth: float, samples: int) -> float:
    """A curve at any depth above 0."""
    depths = sorted(curve)
    if depth >= 1 or len(depths) < 2:
        return float(np.interp(math.log(depth), np.log(depths), [curve[each] for each in depths]))
    least = 0.5 / samples
    far = depths[1]

    def log_odds(share: float) -> float:
        share = min(max(share, least), 1 - least)
        return math.log(share / (1 - share))

    slope = (log_odds(curve[far]) - log_odds(curve[1])) / math.log(far)
    return 1 / (1 + math.exp(-(log_odds(curve[1]) + slope * math.log(depth))))
