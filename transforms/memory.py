# SPDX-License-Identifier: Apache-2.0
"""Memory of an index that uses a model, in a cluster."""

from __future__ import annotations

from typing import Any

from transforms.request import TrainingRequest


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
