# SPDX-License-Identifier: Apache-2.0
"""How good a trained model is, measured on vectors that it was not trained on.

Pure faiss and numpy; runs in the trainer's process, where the sample is in memory, and copies none of it. `evaluate`
returns what `model.json` holds as `quality`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import faiss
import numpy as np

from transforms import faiss_training, index_statistics
from transforms.codebooks import codec_of, read_index
from transforms.drift import drift
from transforms.held_out import ERROR_ROWS, Split, exact, split_sample
from transforms.memory import index_memory
from transforms.recall import DEPTHS
from transforms.request import TrainingRequest
from transforms.searching import by_nprobes, of_another, packed, searcher, share_of_the_graph

#: Vectors to hold out by default; a tenth more are held out as queries.
EVAL_VECTORS = 10_000

#: Vectors, trained on or held out, without which there is nothing to measure: a query and its 10 neighbours.
FEWEST_VECTORS = DEPTHS[0] + 1

# Small codebooks, trained in a second or two on vectors as they were read, to see what normalising them gains: as many
# vectors at most, this many for each codeword at least, and so many iterations.
_RAW_ROWS, _FEW_LISTS, _PER_CODEWORD, _ITERATIONS = 10_000, 16, 20, 10
# For PQ with 16 or more dimensions a sub-quantizer faiss makes tables of 4 m 2^code_size bytes a vector, for 262 144
# vectors at once. With so few the tables of 50 000 vectors (m 8) took 192 MB instead of 419 and 0.2 s instead of 0.9.
faiss.cvar.product_quantizer_compute_codes_bs = 1024
# A training set whose error is so much smaller than that of other vectors does not stand for them in the base.
_OVERFIT = 1.2


def hold_out(eval_vectors: int) -> int:
    """Rows to ask the sample for beyond those to train on: the vectors to evaluate with, and a tenth as queries."""
    return eval_vectors + eval_vectors // 10


def evaluate(
    blob: bytes,
    request: TrainingRequest,
    vectors: np.ndarray,
    trained: int,
    corpus: int,
    *,
    threads: int = 0,
    history: Sequence[Mapping[str, float]] = (),
    nprobes: Sequence[int] = (),
    positions: np.ndarray | None = None,
    previous: bytes | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Tries a model on vectors.

    Args:
      blob: the serialised index.
      request: what it was trained for.
      vectors: (n, columns) of the request's data type, at least `FEWEST_VECTORS`. The first `trained` rows are those
        that it was trained on, as `faiss_training.train` left them (unit vectors for cosinesimil); the rest are as they
        were read, and are normalised in place.
      trained: how many rows were trained on.
      corpus: vectors in the source, for which recall is estimated.
      threads: OpenMP threads; 0 for as many as there were before.
      history: of k-means, from `faiss_training.train`.
      nprobes: values to measure beside the powers of two and the request's own.
      positions: (n,) float32, where each vector is in its source; see `VectorBlock`.
      previous: the blob of another model of the same space type, data type and encoder, to be searched too.

    Returns:
      A mapping that JSON can hold; shares are between 0 and 1, sizes in bytes:
      `vectors`: how many were used for what. `recall`: one entry for each nprobes, with the recall at 10 and 100
      measured in the base (`measured`), what to expect in the whole source (`expected`) and the share of the 10
      nearest that is among 100 found (`rescored`: what rescoring ten times as many can reach). `at`: the entry for the
      request's nprobes or ef_search, with the `standard_error` of what is to expect.
      `error`: mean squared distances between vectors and their codes, or the share of bits that differ. `lists`:
      how even they are. `subquantizers`: error and unused codewords of each. `norms`: of the vectors as read.
      `normalisation` (cosinesimil, where lengths differ): `gain`, how many times larger the error of unit vectors is
      with small codebooks trained on vectors as they were read, as the cluster's `_train` does, than on unit vectors.
      `drift` (with `positions`): along the source, from `drift.drift`. `previous`: the entry of `recall` for the other
      model with its own nprobes or ef_search. `memory`: of an index of the source. `history`: of k-means.
    """
    start = time.monotonic()
    if threads:
        faiss.omp_set_num_threads(threads)
    lengths = _lengths(vectors, trained, request)
    norms = index_statistics.norms(lengths)
    normalisation = None
    if request.normalize:
        normalisation = _normalisation(vectors[trained:], norms, request)
        faiss.normalize_L2(vectors[trained:])
    split = split_sample(vectors, trained)
    first = split.first
    progress("evaluate", 0, 3)
    told: dict[str, Any] = {"vectors": split.counts(corpus)}
    index = read_index(blob)
    subquantizers: list[dict[str, Any]] = []
    if request.is_binary:
        queries, base = packed(split, request)
        told["error"], each_row = _binary_errors(index, base, split)
    else:
        told["error"], each_row, subquantizers, split = _float_errors(index, split)
        told["vectors"] = split.counts(corpus)
        queries = np.ascontiguousarray(split.queries, np.float32)
    progress("evaluate", 1, 3)
    true = exact(split, request)
    progress("evaluate", 2, 3)
    search = searcher(index, split, queries, true)
    wanted = sorted({*nprobes, *([request.nprobes] if request.nprobes else [])})
    graph = None if request.ef_search is None else share_of_the_graph(blob, split)
    told |= by_nprobes(search, true, request, corpus, wanted, graph)
    if previous is not None:
        told["previous"] = of_another(previous, true, split, request, corpus)
    if positions is not None:
        by_position = _drift(each_row, positions, vectors, lengths, trained, first)
        if by_position is not None:
            told["drift"] = by_position
    if request.nlist is not None:
        told["lists"] = index_statistics.lists(index)
    if subquantizers:
        told["subquantizers"] = subquantizers
    if norms:
        told["norms"] = norms
    if normalisation is not None:
        told["normalisation"] = normalisation
    told["error"]["compared_by"] = "coarse" if request.code_size is None else "total"
    told["memory"] = index_memory(request, corpus)
    told["history"] = [dict(step) for step in history]
    progress("evaluate", 3, 3)
    told["seconds"] = time.monotonic() - start
    return _rounded(told)


def quantization_error(blob: bytes, request: TrainingRequest, vectors: np.ndarray) -> float:
    """The mean error of the first of (n, columns) vectors as they were read: what models are compared by.

    Squared distance between a vector and its code, or to its centroid where the codes lose nothing; for binary
    indexes the share of bits that differ from the centroid's.
    """
    index = read_index(blob)
    if isinstance(index, faiss.IndexBinary):
        codes = faiss_training.codes(vectors[:ERROR_ROWS].copy(), request)
        return float(index.quantizer.search(codes, 1)[0].mean()) / index.d
    matrix = faiss_training.prepare(vectors[:ERROR_ROWS].copy(), request)
    if not isinstance(index, faiss.IndexIVF) or isinstance(index, faiss.IndexIVFPQ):
        codec = codec_of(index)
        return float(((codec.sa_decode(codec.sa_encode(matrix)) - matrix) ** 2).sum(axis=1).mean())
    nearest = index.quantizer.search(matrix, 1)[1].ravel()
    return index_statistics.squared(matrix, index.quantizer.reconstruct_batch(nearest))


# --- the index with the base in it ---------------------------------------------------------------------------------


def _float_errors(
    index: faiss.Index, split: Split
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[dict[str, Any]], Split]:
    """Adds the base to the codes of `index`; the mean errors of its rows, those of each row, those of each
    sub-quantizer, and the split that was used.
    """
    codec = codec_of(index)  # not the graph above it, which is slow to build and not searched here
    codec.add(np.ascontiguousarray(split.base, np.float32))
    first = split.base_trained
    parts = {"training": range(0, min(first, ERROR_ROWS)), "held_out": range(first, len(split.base))}
    parts = {name: rows[:ERROR_ROWS] for name, rows in parts.items() if len(rows)}
    errors: dict[str, Any] = {name: index_statistics.errors(index, split.base, rows) for name, rows in parts.items()}
    each = {name: error.pop("each", None) for name, error in errors.items()}
    each_row = {name: error.pop("rows") for name, error in errors.items()}
    overfit = _overfit(errors)
    everything = len(split.base) + (0 if split.own else len(split.queries)) >= len(split.vectors)
    if overfit > _OVERFIT and not split.own and not everything and len(parts["held_out"]) >= DEPTHS[-1]:
        codec.reset()
        split = split.without_trained()
        codec.add(np.ascontiguousarray(split.base, np.float32))
    shown = np.ascontiguousarray(split.base[:ERROR_ROWS], np.float32)
    errors["variance"] = float(shown.var(axis=0, dtype=np.float64).sum())
    subquantizers = index_statistics.subquantizers(index, each)
    return errors, each_row, subquantizers, split


def _overfit(errors: Mapping[str, Mapping[str, float]]) -> float:
    """How many times larger the error of held-out vectors is than that of trained ones; 1 where it is not known."""
    if not {"training", "held_out"} <= set(errors):
        return 1.0
    name = "total" if errors["training"].get("total") else "coarse"
    before = errors["training"].get(name, 0.0)
    return errors["held_out"][name] / before if before else 1.0


def _binary_errors(
    index: faiss.IndexBinaryIVF, base: np.ndarray, split: Split
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Adds the packed base to `index`; the mean errors of its rows, and those of each row."""
    index.add(base)
    first = split.base_trained
    parts = {"training": base[: min(first, ERROR_ROWS)], "held_out": base[first:][:ERROR_ROWS]}
    each_row = {name: index.quantizer.search(rows, 1)[0].ravel() / index.d for name, rows in parts.items() if len(rows)}
    return {name: {"coarse": float(each.mean())} for name, each in each_row.items()}, each_row


def _drift(
    each_row: Mapping[str, np.ndarray],
    positions: np.ndarray,
    vectors: np.ndarray,
    lengths: Mapping[str, np.ndarray],
    trained: int,
    first: int,
) -> dict[str, Any] | None:
    """Drift as the vectors that were held out show it, or else those that were trained on."""
    if "held_out" in each_row:
        errors, start = each_row["held_out"], trained
        own = lengths["held_out"][: len(errors)] if "held_out" in lengths else None
    else:
        errors, start = each_row["training"], first
        # Other rows of those trained on: the base has the last of them.
        own = index_statistics.lengths_of(vectors[start:][: len(errors)]) if "training" in lengths else None
    rows = slice(start, start + len(errors))
    return drift(positions[rows], vectors[rows], errors, own)


def _lengths(vectors: np.ndarray, trained: int, request: TrainingRequest) -> dict[str, np.ndarray]:
    """Lengths of the vectors as they were read: those held out, and those trained on unless they were normalised."""
    if request.data_type == "binary":
        return {}
    parts = {"held_out": vectors[trained:][:ERROR_ROWS]}
    if not request.normalize:
        parts["training"] = vectors[:trained][:ERROR_ROWS]
    return {name: index_statistics.lengths_of(rows) for name, rows in parts.items()}


def _normalisation(raw: np.ndarray, norms: Mapping[str, Any], request: TrainingRequest) -> dict[str, float] | None:
    """What training on unit vectors gains, tried on a few held-out ones; None where they are too few or all unit."""
    half = min(_RAW_ROWS, len(raw) // 2)
    lengths = norms.get("held_out")
    needed = _PER_CODEWORD * max(_FEW_LISTS, 2**request.code_size if request.code_size is not None else 0)
    if request.is_binary or half < needed or not lengths or lengths["deviation"] < 1e-3 * lengths["mean"]:
        return None
    encoder = "Flat" if request.code_size is None else f"PQ{request.pq_m}x{request.code_size}np"
    unit = raw[: 2 * half].copy()
    faiss.normalize_L2(unit)
    errors = []
    for training in (raw[:half], unit[:half]):
        index = faiss.index_factory(request.dimension, f"IVF{_FEW_LISTS},{encoder}", faiss.METRIC_INNER_PRODUCT)
        if isinstance(index, faiss.IndexIVFPQ):
            index.pq.cp.niter = _ITERATIONS
        index.train(np.ascontiguousarray(training))
        rebuilt = index.sa_decode(index.sa_encode(unit[half:]))
        if request.code_size is None:
            rebuilt = index.quantizer.reconstruct_batch(index.quantizer.search(unit[half:], 1)[1].ravel())
        errors.append(index_statistics.squared(unit[half:], rebuilt))
    return {"gain": errors[0] / errors[1] if errors[1] else 1.0}


def _rounded(value: Any) -> Any:
    """Floats with six significant digits: no measurement here has more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
