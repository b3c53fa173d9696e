# SPDX-License-Identifier: Apache-2.0
"""Searching an index that has the base in it: how many of the true neighbours it finds, by nprobes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import faiss
import numpy as np

from transforms import quantization
from transforms.codebooks import codec_of, read_index
from transforms.held_out import Split, found
from transforms.recall import CURVE, DEPTHS, Neighbours, curve_of_halves, expected
from transforms.request import TrainingRequest

# Vectors to build a graph of: that is the slowest part.
_GRAPH_ROWS = 10_000
# No more lists than this are probed unless asked for, nor more once recall@100 does not grow.
_MOST_PROBES, _NO_GAIN = 256, 0.002

#: What `held_out.found` finds with so many lists probed; None searches all codes.
Search = Callable[[int | None], tuple[np.ndarray, np.ndarray]]


def searcher(index: faiss.Index | faiss.IndexBinary, split: Split, queries: np.ndarray, true: Neighbours) -> Search:
    """Searches `index`, which holds the base of `split`, for its (queries, columns) queries as the index takes them."""
    if isinstance(index, faiss.IndexHNSW):
        return lambda nprobes: found(codec_of(index), split, queries, true)
    if isinstance(index, faiss.IndexIVFPQ) and index.metric_type == faiss.METRIC_L2:
        table = 4 * index.nlist * index.pq.M * index.pq.ksub
        if table <= max(64_000_000, 4 * 65_536 * index.d):  # training needed as much
            index.use_precomputed_table = 0
            index.precompute_table()

    def search(nprobes: int | None) -> tuple[np.ndarray, np.ndarray]:
        index.nprobe = nprobes or index.nlist
        return found(index, split, queries, true)

    return search


def by_nprobes(
    search: Search, true: Neighbours, request: TrainingRequest, corpus: int, wanted: Sequence[int], graph: float | None
) -> dict[str, Any]:
    """`recall` and `at` of `quality.evaluate`.

    Args:
      true: what `search` should find.
      corpus: vectors in the source.
      wanted: nprobes to measure beside the powers of two.
      graph: from `share_of_the_graph`, for HNSW.
    """
    rows: list[dict[str, Any]] = []
    errors: dict[int | None, dict[str, float]] = {}
    for probes in _grid(request.nlist, wanted):
        row, errors[probes] = _row(probes, *search(probes), true, corpus, graph)
        before = rows[-1]["expected"] if rows else dict.fromkeys(row["expected"], 0.0)
        gain = max(row["expected"][name] - before[name] for name in before)
        rows.append(row)
        if probes is None or (gain < _NO_GAIN and min(row["expected"].values()) > 0.1 and probes >= max(wanted)):
            break
    own = next((row for row in rows if row.get("nprobes") == request.nprobes), rows[-1])
    at = {**own, "standard_error": errors[own.get("nprobes")]}
    if graph is not None:
        at |= {"ef_search": request.ef_search, "graph": graph}
    return {"recall": rows, "at": at}


def of_another(blob: bytes, true: Neighbours, split: Split, request: TrainingRequest, corpus: int) -> dict[str, Any]:
    """An entry of `recall` for another model, with the nprobes or ef_search in its blob.

    Binary models hold no nprobes: they are searched with those of the request.
    """
    index = read_index(blob)
    if isinstance(index, faiss.IndexBinary):
        queries, base = packed(split, request)
        index.nprobe = min(request.nprobes or 1, index.nlist)
        index.add(base)
    else:
        queries, base = (np.ascontiguousarray(part, np.float32) for part in (split.queries, split.base))
        codec_of(index).add(base)
    search = searcher(index, split, queries, true)
    if isinstance(index, faiss.IndexHNSW):
        row, _ = _row(None, *search(None), true, corpus, share_of_the_graph(blob, split))
        return {**row, "ef_search": index.hnsw.efSearch}
    return _row(index.nprobe, *search(index.nprobe), true, corpus, None)[0]


def share_of_the_graph(blob: bytes, split: Split) -> float:
    """The share of what a search of all codes of an HNSW index finds that its graph finds with the blob's efSearch."""
    index = read_index(blob)
    index.add(np.ascontiguousarray(split.base[-_GRAPH_ROWS:], np.float32))
    queries = np.ascontiguousarray(split.queries, np.float32)
    by_graph, by_codes = (each.search(queries, 10)[1] for each in (index, codec_of(index)))
    return float((by_graph[:, :, None] == by_codes[:, None, :]).any(axis=2).mean())


def packed(split: Split, request: TrainingRequest) -> tuple[np.ndarray, np.ndarray]:
    """Queries and base as packed bits, for a binary index."""
    base, queries = split.base, split.queries
    if request.quantization_bits is not None:
        limits = quantization.thresholds(base, request.quantization_bits)
        base, queries = quantization.pack(base, limits), quantization.pack(queries, limits)
    return np.ascontiguousarray(queries).view(np.uint8), np.ascontiguousarray(base).view(np.uint8)


def _row(
    probes: int | None, ids: np.ndarray, distances: np.ndarray, true: Neighbours, corpus: int, graph: float | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """An entry of `recall` for what `held_out.found` found, and the standard errors of `expected`."""
    deepest, growth = true.ids.shape[1], corpus / true.rows
    depths = [k for k in DEPTHS if k <= deepest]
    each = {k: true.recall(distances, k) for k in CURVE if k <= deepest}
    curve = {k: float(shares.mean()) for k, shares in each.items()}
    halves = curve_of_halves(true, ids, distances)
    share = 1.0 if graph is None else graph
    row: dict[str, Any] = {} if probes is None else {"nprobes": probes}
    row["measured"] = {str(k): share * curve[k] for k in depths}
    row["expected"] = {str(k): share * expected(curve, halves, k, growth, len(ids)) for k in depths}
    few = max(1, round(10 / growth))
    if 10 * few <= deepest:
        row["rescored"] = float(true.recall(distances, few, among=10 * few).mean())
    # The error of the estimate is that of the depth that it was read off.
    read_off = {k: min(curve, key=lambda depth: abs(depth - k / growth)) for k in depths}
    return row, {str(k): float(each[at].std() / math.sqrt(len(ids))) for k, at in read_off.items()}


def _grid(nlist: int | None, wanted: Sequence[int]) -> list[int | None]:
    """Powers of two, the values asked for, and all lists where there are few; [None] for an index without lists."""
    if nlist is None:
        return [None]
    powers = [2**power for power in range(_MOST_PROBES.bit_length()) if 2**power < nlist]
    if nlist <= _MOST_PROBES:
        powers.append(nlist)
    return sorted({*powers, *(min(value, nlist) for value in wanted)})
