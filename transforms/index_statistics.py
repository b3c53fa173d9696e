# SPDX-License-Identifier: Apache-2.0
"""Statistics of an index with vectors in it: what its codes lose, and how its lists and codewords are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np

from transforms.codebooks import codec_of


def errors(index: faiss.Index, base: np.ndarray, rows: range) -> dict[str, Any]:
    """Mean squared distances of some rows to what the index makes of them.

    Args:
      index: an IVF, or an HNSW-PQ, whose codes are those of `base`, in its order.
      base: (n, dimension) vectors.
      rows: of the base, to look at.

    Returns:
      `coarse`, to the centroid (IVF only); `total`, to the code; `each`, (m,) shares of `total` by sub-quantizer (PQ
      only); `rows`, (rows,) float32 for each row: what makes up `total` for a PQ, else `coarse`.
    """
    vectors = np.ascontiguousarray(base[rows.start : rows.stop], np.float32)
    found: dict[str, Any] = {}
    if isinstance(index, faiss.IndexIVF):
        lists = faiss.vector_to_array(index.direct_map.array)[rows.start : rows.stop] >> 32
        found["rows"] = _distances(vectors, index.quantizer.reconstruct_batch(lists))
        found["coarse"] = float(found["rows"].mean(dtype=np.float64))
    codec = codec_of(index)
    rebuilt = codec.reconstruct_n(rows.start, len(rows))
    found["total"] = squared(vectors, rebuilt)
    pq = getattr(codec, "pq", None)
    if pq is not None:
        found["rows"] = _distances(vectors, rebuilt)
        found["each"] = ((vectors - rebuilt) ** 2).mean(axis=0, dtype=np.float64).reshape(pq.M, pq.dsub).sum(axis=1)
    return found


def squared(one: np.ndarray, two: np.ndarray) -> float:
    """Mean squared distance of the rows of two matrices."""
    return float(_distances(one, two).mean(dtype=np.float64))


def _distances(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """(n,) float32 squared distances of the rows of two matrices."""
    distances: np.ndarray = ((one - two) ** 2).sum(axis=1)
    return distances


def subquantizers(index: faiss.Index, errors: Mapping[str, np.ndarray | None]) -> list[dict[str, Any]]:
    """For each sub-quantizer of a PQ its errors, by name, and how many of its codewords no vector in the index uses.

    Args:
      errors: (m,) each, or None where there are none.
    """
    known = {name: each for name, each in errors.items() if each is not None}
    if not known:
        return []
    codec = codec_of(index)
    codes = _codes(codec)
    used = [len(np.unique(codes[:, m])) for m in range(codec.pq.M)]
    return [
        {"unused": codec.pq.ksub - used[m], **{name: float(each[m]) for name, each in known.items()}}
        for m in range(codec.pq.M)
    ]


def _codes(index: faiss.IndexIVFPQ | faiss.IndexPQ) -> np.ndarray:
    """(ntotal, m) codes, in no particular order."""
    if isinstance(index, faiss.IndexPQ):
        packed = faiss.vector_to_array(index.codes).reshape(index.ntotal, -1)
    else:
        lists = index.invlists
        parts = [
            faiss.rev_swig_ptr(lists.get_codes(number), lists.list_size(number) * lists.code_size).copy()
            for number in range(index.nlist)
            if lists.list_size(number)
        ]
        packed = np.concatenate(parts).reshape(index.ntotal, -1)
    return packed if index.pq.nbits == 8 else faiss.unpack_bitstrings(packed, index.pq.M, index.pq.nbits)


def lists(index: faiss.IndexIVF | faiss.IndexBinaryIVF) -> dict[str, Any]:
    """How even the inverted lists of an index with vectors in it are.

    `imbalance_factor` is faiss's, nlist * sum of squared shares: how many times longer a search takes than with lists
    of one size. With few vectors a list chance alone makes it larger, by nlist / n, which is taken off here.
    """
    sizes = np.array([index.invlists.list_size(number) for number in range(index.nlist)])
    total = int(sizes.sum())
    pairs = float((sizes.astype(np.float64) * (sizes - 1)).sum())
    ordered = np.sort(sizes)[::-1]
    at = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), 100)).astype(int))
    return {
        "imbalance_factor": max(1.0, len(sizes) * pairs / (total * (total - 1.0))) if total > 1 else 1.0,
        "empty": int((sizes == 0).sum()),
        "largest": float(ordered[0] / max(total, 1)),
        "mean": total / len(sizes),
        "sizes": {"rank": [int(rank) for rank in at], "vectors": [int(ordered[rank]) for rank in at]},
    }


def norms(parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean, standard deviation and 21 quantiles of some arrays of lengths, by the arrays' names."""
    return {
        name: {
            "mean": float(lengths.mean()),
            "deviation": float(lengths.std()),
            "quantiles": [float(value) for value in np.quantile(lengths, np.linspace(0, 1, 21))],
        }
        for name, lengths in parts.items()
        if len(lengths)
    }


def lengths_of(rows: np.ndarray) -> np.ndarray:
    """(n,) float64 Euclidean lengths of the rows of a matrix of any numeric type."""
    matrix = rows.astype(np.float64)
    return np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
