# SPDX-License-Identifier: Apache-2.0
"""Memory that a training needs here, and an index that uses the model in a cluster."""

from __future__ import annotations

from typing import Any

from transforms.held_out import BASE_VALUES, ERROR_ROWS
from transforms.request import TrainingRequest


def training_memory(request: TrainingRequest, count: int, held_out: int = 0, evaluate: bool = False) -> int:
    """Bytes that a process needs at its peak to train on `count` vectors and to try the model; within a quarter where
    it was measured.

    The terms: Python, numpy, faiss and its work space; the sample, with `held_out` rows that are set aside, and 48
    bytes a vector for its priorities, positions and order while it is loaded; and the larger of two.

    Training: for bytes a float copy; for IVF an assignment of 12 bytes a vector, the centroids three times, and the
    larger of the subset that k-means draws from more than 256 nlist vectors and, for IVF-PQ, the residuals of the
    encoder's subset with that subset itself, if it is one. Binary indexes decode 32 768 vectors to floats at a time.

    Evaluation: the codes of the base, in lists that have grown to half as much again; for bytes a float copy of the
    base; and twice the vectors that errors are measured on, to compare them with what the codes make of them.
    """
    dimension, columns = request.trained_dimension, request.dimension // (8 if request.data_type == "binary" else 1)
    row = columns * (4 if request.data_type == "float" else 1)
    fixed = 90_000_000 + (count + held_out) * row + 48 * count + 2 * request.blob_bytes
    copy = 4 * request.dimension if request.data_type == "byte" else 0
    training = copy * count
    if request.is_binary:
        training += count * dimension // 8 + 4 * min(count, 32_768) * dimension
    elif request.nlist is not None:
        training += 12 * count + 12 * request.nlist * dimension
        drawn = 4 * 256 * request.nlist * dimension if count > 256 * request.nlist else 0
        residuals = 0
        if request.code_size is not None:
            subset = min(count, 256 << request.code_size)
            residuals = 4 * subset * dimension * (2 if count > subset else 1)
        training += max(drawn, residuals)
    evaluation = 0
    if evaluate:
        base = min(count + held_out, BASE_VALUES // columns)
        evaluation = int(1.5 * code_bytes(request) * base) + copy * base
        if not request.is_binary:
            evaluation += 8 * request.dimension * min(base, ERROR_ROWS)
    return fixed + max(training, evaluation)


def index_memory(request: TrainingRequest, vectors: int) -> dict[str, Any]:
    """What an index of `vectors` vectors takes in native memory, in bytes, without replicas.

    The formulas are those of OpenSearch's documentation ("Methods and engines", "Faiss product quantization",
    "Binary k-NN vectors"): 1.1 times each vector's code (and, with PQ, 24 bytes; with HNSW, 8 m) and, for each segment,
    the model's centroids and codewords. L2 IVF-PQ also shares one search table a node
    (`SharedIndexStateManager`): nlist * m * 2^code_size * 4.

    Returns:
      `code_bytes`, a code alone; `bytes_per_vector`; `vectors_bytes`, for all vectors; `segment_bytes`, more for each
      segment, of which only the index knows how many it has; `table_bytes`, more on each node.
    """
    code = code_bytes(request)
    own = float(code)
    if request.pq_m is not None:
        own += 24
    if request.hnsw_m is not None:
        own += 8 * request.hnsw_m
    model = 0.0
    if request.nlist is not None:
        model += request.nlist * (request.trained_dimension / 8 if request.is_binary else 4 * request.dimension)
    if request.code_size is not None:
        model += 4 * request.dimension * 2**request.code_size
    table = 0
    if request.nlist and request.pq_m and request.code_size and not request.inner_product:
        table = 4 * request.nlist * request.pq_m * 2**request.code_size
    return {
        "code_bytes": code,
        "bytes_per_vector": 1.1 * own,
        "vectors_bytes": 1.1 * own * vectors,
        "segment_bytes": 1.1 * model,
        "table_bytes": table,
    }


def code_bytes(request: TrainingRequest) -> float:
    """Bytes of one vector's code, as faiss stores it."""
    if request.is_binary:
        return request.trained_dimension / 8
    if request.code_size is not None and request.pq_m is not None:
        return float(-(-request.pq_m * request.code_size // 8))
    if request.data_type == "byte":
        return float(request.dimension)
    return float(request.dimension * (2 if request.index_description.endswith("SQfp16") else 4))
