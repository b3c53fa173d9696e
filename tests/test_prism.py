# SPDX-License-Identifier: Apache-2.0
"""The same model, byte for byte, from the runners that this machine can have without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runners import prism, required
from tests.runners.job import knn_train, vectors, write_export


@pytest.fixture(scope="module")
def prism_options() -> list[str]:
    return required(prism.options)


@pytest.fixture(scope="module")
def expected(export: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the model that the local runner trains."""
    return knn_train(tmp_path_factory.mktemp("local"), "--parquet", export).checked().blob_sha256


def test_two_worker_processes_train_the_same_model(export: str, expected: str, tmp_path: Path) -> None:
    flags = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    assert knn_train(tmp_path, "--parquet", export, *flags).checked().blob_sha256 == expected


def test_prism_trains_the_same_model(export: str, expected: str, prism_options: list[str], tmp_path: Path) -> None:
    assert knn_train(tmp_path, "--parquet", export, *prism_options).checked().blob_sha256 == expected


def test_a_failure_on_prism_ends_with_one_line(prism_options: list[str], tmp_path: Path) -> None:
    broken = vectors()
    broken[:, 0] = float("nan")
    run = knn_train(tmp_path, "--parquet", write_export(tmp_path / "export", broken), *prism_options)
    assert run.code == 1
    assert "Traceback" not in run.errors
    assert run.errors.splitlines()[-1].startswith("failed: 1 bad vector, 0 allowed (max_bad_vectors); the first is ")
