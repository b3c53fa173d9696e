# SPDX-License-Identifier: Apache-2.0
"""Training with GPUs. Where there is none, the part of faiss that needs one is stubbed: see `gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipelines import train
from tests.test_train import ACCELERATOR, arguments, export, work  # noqa: F401
from transforms import faiss_training
from transforms.errors import RequestError
from transforms.request import TrainingRequest

D, LISTS = 32, 16
VECTORS = np.random.default_rng(6).standard_normal((8_000, D)).astype(np.float32)


def request(space_type: str = "l2", encoder: dict[str, Any] | None = None, **fields: Any) -> TrainingRequest:
    parameters = {"nlist": LISTS, **({"encoder": encoder} if encoder else {})}
    method = {"name": "ivf", "engine": "faiss", "space_type": space_type, "parameters": parameters}
    return TrainingRequest.from_fields(
        {"training_index": "i", "training_field": "f", "dimension": D, "method": method, **fields}
    )


def vectors_for(wanted: TrainingRequest) -> np.ndarray:
    return VECTORS if wanted.data_type == "float" else np.clip(40 * VECTORS, -128, 127).astype(np.int8)


PQ = {"name": "pq", "parameters": {"m": 8, "code_size": 6}}
GRAPH = {"name": "hnsw", "engine": "faiss", "parameters": {"encoder": {"name": "pq", "parameters": {"m": 4}}}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[faiss.Index]:
    """A stub of the two functions that faiss-cpu lacks: one GPU, whose index is another one on the CPU.

    It shows that centroids come back from whatever index they were trained with. That a GPU finds the nearest of them
    is faiss's to show, and `test_a_real_gpu` that it does here.
    """
    copies: list[faiss.Index] = []

    def to_gpu(index: faiss.Index) -> faiss.Index:
        copies.append(faiss.clone_index(index))
        return copies[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpu, raising=False)
    return copies


KINDS = {
    "flat": request(),
    "pq": request(encoder=PQ),
    "inner product": request("innerproduct", PQ),
    "cosine": request("cosinesimil", PQ),
    "byte": request(data_type="byte"),
}


@pytest.mark.parametrize("wanted", KINDS.values(), ids=KINDS)
def test_centroids_come_back_from_the_gpu(
    wanted: TrainingRequest, gpu: list[faiss.Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = vectors_for(wanted)
    history: list[dict[str, float]] = []
    blob = faiss_training.train(vectors.copy(), wanted, 2, history=history)
    assert [index.ntotal for index in gpu] == [LISTS]
    assert len(history) == 10
    assert faiss_training.usable_gpus(wanted) == 1
    faiss_training.check(blob, wanted, vectors[:16])
    gpu.clear()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert faiss_training.train(vectors.copy(), wanted, 2) == blob
    assert gpu == []


def test_binary_and_graph_models_use_none(gpu: list[faiss.Index]) -> None:
    binary = request("hamming", data_type="binary")
    for wanted, vectors in ((request(method=GRAPH), VECTORS), (binary, np.packbits(VECTORS > 0, axis=1))):
        assert faiss_training.usable_gpus(wanted) == 0
        faiss_training.train(vectors.copy(), wanted, 2)
    assert gpu == []


@pytest.mark.skipif(not faiss.get_num_gpus(), reason="faiss sees no GPU: this needs one, and a faiss built for it")
@pytest.mark.parametrize("wanted", KINDS.values(), ids=KINDS)
def test_a_real_gpu_trains_as_well(wanted: TrainingRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vectors_for(wanted)
    histories: list[list[dict[str, float]]] = [[], []]
    faiss_training.train(vectors.copy(), wanted, 2, history=histories[0])
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    faiss_training.train(vectors.copy(), wanted, 2, history=histories[1])
    ours, cpus = (history[-1]["objective"] for history in histories)
    assert ours == pytest.approx(cpus, rel=0.01)


def test_without_a_gpu_the_model_is_the_same_and_says_so(
    work: Path,  # noqa: F811
    export: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (without,) = train.run(arguments(work, export, "--model_id", "cpu"))
    if without["provenance"]["training_gpus"]:
        pytest.skip("there is a GPU")
    assert "without a GPU" not in capsys.readouterr().err
    (wanted,) = train.run(arguments(work, export, "--model_id", "gpu", "--accelerator", ACCELERATOR))
    assert wanted["provenance"]["blob_sha256"] == without["provenance"]["blob_sha256"]
    printed = capsys.readouterr()
    assert "warning: it was trained without a GPU: faiss on that worker sees none" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--accelerator", "t4"],
            "accelerator is 't4', expected a type and a count, as 'type:nvidia-tesla-t4;count:1;",
        ),
        (["--accelerator", "type:t4;count:0"], "accelerator is 'type:t4;count:0', expected"),
        (["--accelerator", ACCELERATOR, "--method", json.dumps(GRAPH)], "accelerator is 'type.* has no use for one"),
    ],
)
def test_bad_accelerators(work: Path, export: str, words: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(RequestError, match=message):
        train.run(arguments(work, export, *words))
    assert not (work / "models").exists()
