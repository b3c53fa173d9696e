# SPDX-License-Identifier: Apache-2.0
"""Which vectors of a sample are searched, which are searched for, and what exact search finds.

Nothing is copied: all are views of the sample, but for queries that were trained on.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from transforms.recall import DEPTHS, Neighbours
from transforms.request import TrainingRequest

#: With fewer queries left, trained vectors are queries, each without itself among its neighbours.
FEWEST_QUERIES = 100
_MOST_QUERIES = 1_000

#: Values in the vectors that are searched: a fixed cost, 100 000 vectors of 128 dimensions.
BASE_VALUES = 12_800_000

#: Vectors to measure errors on, of those trained on and of those held out.
ERROR_ROWS = 10_000

_DEPTH = DEPTHS[-1]


class Split:
    """Which rows are searched and which are searched for. All are views of the sample but leave-one-out queries."""

    def __init__(self, vectors: np.ndarray, trained: int, first: int, last: int, queries: np.ndarray, own: bool):
        self.vectors, self.trained, self.first, self.last = vectors, trained, first, last
        self.queries = queries
        #: True when query i is row i of the base.
        self.own = own

    @property
    def base(self) -> np.ndarray:
        return self.vectors[self.first : self.last]

    @property
    def base_trained(self) -> int:
        """Rows at the beginning of the base that were trained on."""
        return self.trained - self.first

    def without_trained(self) -> Split:
        return Split(self.vectors, self.trained, self.trained, self.last, self.queries, False)

    def counts(self, corpus: int) -> dict[str, Any]:
        return {
            "source": corpus,
            "trained": self.trained,
            "held_out": self.last - self.trained,
            "base": len(self.base),
            "queries": len(self.queries),
            "queries_held_out": not self.own,
        }


def split_sample(vectors: np.ndarray, trained: int) -> Split:
    """Queries and base of a sample.

    Args:
      vectors: (n, columns), those trained on first.
      trained: how many those are.
    """
    left = len(vectors) - trained
    queries = min(_MOST_QUERIES, left // 11)
    if queries < FEWEST_QUERIES:
        first = _first(vectors, trained, len(vectors))
        return Split(vectors, trained, first, len(vectors), vectors[first : first + _MOST_QUERIES], True)
    last = len(vectors) - queries
    return Split(vectors, trained, _first(vectors, trained, last), last, vectors[last:], False)


def _first(vectors: np.ndarray, trained: int, last: int) -> int:
    """All that was held out is searched, and as much of the training set before it as is affordable."""
    return min(trained, max(0, last - BASE_VALUES // vectors.shape[1]))


def depth_of(split: Split) -> int:
    """How many neighbours are looked for."""
    return min(_DEPTH, len(split.base) - split.own)


def exact(split: Split, request: TrainingRequest) -> Neighbours:
    """The true nearest neighbours of the queries in the base, by the request's space type."""
    depth = depth_of(split) + split.own
    if request.data_type == "binary":
        flat = faiss.IndexBinaryFlat(request.dimension)
        flat.add(np.ascontiguousarray(split.base))
        distances, ids = flat.search(np.ascontiguousarray(split.queries), depth)
        distances = distances.astype(np.float32)
    else:
        inner = request.space_type in ("innerproduct", "cosinesimil")
        metric = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
        queries, base = (np.ascontiguousarray(part, np.float32) for part in (split.queries, split.base))
        distances, ids = faiss.knn(queries, base, depth, metric)
        if inner:
            distances = -distances
    if split.own:
        keep = _without_own(ids)
        distances, ids = (np.take_along_axis(part, keep, axis=1) for part in (distances, ids))
    return Neighbours(distances, ids, len(split.base))


def _without_own(ids: np.ndarray) -> np.ndarray:
    """(queries, depth - 1) columns of `ids` in order, without the query's own row or else without the last."""
    own = ids == np.arange(len(ids))[:, None]
    return np.argsort(own, axis=1, kind="stable")[:, :-1]


def found(
    index: faiss.Index | faiss.IndexBinary, split: Split, queries: np.ndarray, true: Neighbours
) -> tuple[np.ndarray, np.ndarray]:
    """(queries, depth) ids that an index with the base in it finds, and their exact distances.

    Distances are infinite beyond the depth of `true`, but for binary vectors: of those many are as far away as the last
    neighbour, and the index, which keeps all bits, knows how far that is.
    """
    distances, ids = index.search(queries, depth_of(split) + split.own)
    if split.own:
        keep = _without_own(ids)
        distances, ids = (np.take_along_axis(part, keep, axis=1) for part in (distances, ids))
    if split.base.dtype == np.uint8:
        return ids, np.where(ids < 0, np.float32(np.inf), distances.astype(np.float32))
    return ids, true.distances_of(ids)
