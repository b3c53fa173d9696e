# SPDX-License-Identifier: Apache-2.0
"""Small models of every kind, trained here, for the tests and the benchmark that publish them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transforms import faiss_training
from transforms.model import CREATED, TrainedModel, blob_digest, metadata, random_model_id
from transforms.request import TrainingRequest

DIMENSION = 16
PQ = {"name": "pq", "parameters": {"m": 4, "code_size": 4}}
HNSW_PQ = {"name": "pq", "parameters": {"m": 4, "code_size": 8}}


@dataclass(frozen=True)
class Case:
    """A kind of model: the method, or what differs for a version, and the vectors it is trained on."""

    method: Mapping[str, Any]
    data_type: str = "float"
    space_type: str = "l2"

    def request(self, version: str, **fields: Any) -> TrainingRequest:
        method = {"engine": "faiss", "space_type": self.space_type, **self.method}
        if method.get("parameters", {}).get("encoder") == "sq fp16":
            sq: dict[str, Any] = {"bits": 16} if version.startswith("3") else {"type": "fp16"}
            method["parameters"] = {**method["parameters"], "encoder": {"name": "sq", "parameters": sq}}
        body = {"dimension": DIMENSION, "data_type": self.data_type, "method": method, **fields}
        return TrainingRequest.from_fields(body, target_version=version, require_index=False, require_field=False)

    def vectors(self, count: int = 1200, seed: int = 7) -> np.ndarray:
        rng = np.random.default_rng(seed)
        if self.data_type == "byte":
            return rng.integers(-128, 128, (count, DIMENSION), dtype=np.int8)
        if self.data_type == "binary":
            return rng.integers(0, 256, (count, DIMENSION // 8), dtype=np.uint8)
        return rng.standard_normal((count, DIMENSION), dtype=np.float32)

    def model(self, request: TrainingRequest, model_id: str | None = None, seed: int = 7) -> TrainedModel:
        blob = faiss_training.train(self.vectors(seed=seed), request, threads=1)
        return TrainedModel(model_id or random_model_id(), metadata(request, CREATED), blob, blob_digest(blob))


def ivf(**parameters: Any) -> dict[str, Any]:
    return {"name": "ivf", "parameters": {"nlist": 8, "nprobes": 3, **parameters}}


CASES = {
    "IVF-Flat": Case(ivf()),
    "IVF-PQ": Case(ivf(encoder=PQ)),
    "IVF-SQfp16": Case(ivf(encoder="sq fp16")),
    "HNSW-PQ": Case({"name": "hnsw", "parameters": {"encoder": HNSW_PQ}}),
    "byte": Case(ivf(), "byte"),
    "binary": Case(ivf(), "binary", "hamming"),
    "cosine": Case(ivf(), space_type="cosinesimil"),
    "binary encoder": Case(ivf(encoder={"name": "binary", "parameters": {"bits": 1}})),
}
