# SPDX-License-Identifier: Apache-2.0
"""The same model, byte for byte, from a Flink cluster of separate processes; and what is left when parts of it die.

`make flink` runs this and shows what each run took.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from pipelines.options import parse
from tests.opensearch.support import Proxy, fill, open_contexts
from tests.opensearch_server import OpenSearchServer
from tests.runners import CHECKOUT, flink_cluster, required
from tests.runners.flink_cluster import FlinkCluster
from tests.runners.job import REQUEST, Job, Run, knn_train, start_knn_train, vectors
from transforms.errors import RequestError
from transforms.model_files import ModelFiles
from transforms.vectors import MAX_BLOCK_BYTES

PACKAGE = f"--setup_file={CHECKOUT}/setup.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[FlinkCluster]:
    start = time.monotonic()
    with closing(required(FlinkCluster)) as cluster:
        cluster.start()
        print(f"\nFlink: {cluster.overview()} after {time.monotonic() - start:.1f} s")
        yield cluster


@pytest.fixture(scope="module")
def index(opensearch_3: OpenSearchServer) -> Iterator[OpenSearchServer]:
    fill(opensearch_3, REQUEST["training_index"], vectors(), shards=2, field=REQUEST["training_field"])
    yield opensearch_3
    opensearch_3.client().indices.delete(index=REQUEST["training_index"])


def told(name: str, run: Run) -> None:
    print(f"{name}: {run.seconds:.1f} s, model {run.blob_bytes:,} bytes, SHA-256 {run.blob_sha256}")


def soon(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_parquet(cluster: FlinkCluster, export: str, tmp_path: Path) -> None:
    expected = knn_train(tmp_path / "local", "--parquet", export).checked()
    told("Parquet, this process", expected)
    run = knn_train(tmp_path / "flink", "--parquet", export, PACKAGE, *cluster.options).checked()
    told("Parquet, Flink", run)
    assert run.blob_sha256 == expected.blob_sha256


def test_a_job_server_that_beam_starts(cluster: FlinkCluster, export: str, tmp_path: Path) -> None:
    expected = knn_train(tmp_path / "local", "--parquet", export).checked()
    jar = flink_cluster.job_server_jar(tmp_path)
    runner = ["--runner=FlinkRunner", f"--flink_master=localhost:{cluster.rest_port}", f"--flink_job_server_jar={jar}"]
    run = knn_train(tmp_path / "flink", "--parquet", export, PACKAGE, *runner, *cluster.environment).checked()
    told("Parquet, Flink, Beam's own job server", run)
    assert run.blob_sha256 == expected.blob_sha256


def test_opensearch_and_a_task_manager_killed_in_mid_read(
    cluster: FlinkCluster, index: OpenSearchServer, tmp_path: Path
) -> None:
    """The job is restarted, as the cluster is set up to, when another TaskManager has come."""
    expected = knn_train(tmp_path / "local", "--opensearch_url", index.url).checked()
    told("OpenSearch, this process", expected)
    reading, killed = threading.Event(), threading.Event()

    def rule(method: str, path: str, body: bytes) -> None:
        if path.startswith("/_search?") and cluster.workers():  # not the launcher's
            reading.set()
            killed.wait(60)

    with Proxy(index.url, rule) as proxy:
        job = start_knn_train(tmp_path / "killed", "--opensearch_url", proxy.url, PACKAGE, *cluster.options)
        try:
            soon(lambda: reading.is_set() or job.process.poll() is not None)
            cluster.kill_task_manager()
            killed.set()
            cluster.add_task_manager()
            run = job.wait().checked()
        finally:
            job.process.kill()
    assert reading.is_set()
    told("OpenSearch, Flink, a TaskManager killed", run)
    assert run.blob_sha256 == expected.blob_sha256
    soon(lambda: not cluster.workers())


def test_no_element_grows_with_the_sample(cluster: FlinkCluster) -> None:
    """Of all that the runs before have sent between workers."""
    largest = cluster.largest_element()
    print(f"largest element sent: {largest:,} bytes")
    assert 0 < largest < MAX_BLOCK_BYTES / 1000


@contextmanager
def training(cluster: FlinkCluster, export: str, work: Path) -> Iterator[tuple[Job, psutil.Process]]:
    """A run whose trainer has just started, and the trainer. It would train for a minute."""
    method = json.dumps({**REQUEST["method"], "parameters": {"nlist": 8_000}})
    flags = ["--parquet", export, "--method", method, "--max_training_vector_count", "40000"]
    job = start_knn_train(work, *flags, PACKAGE, *cluster.options)
    try:
        soon(lambda: cluster.workers("transforms.trainer_process") or job.process.poll() is not None)
        (trainer,) = cluster.workers("transforms.trainer_process")
        yield job, trainer
    finally:
        job.process.kill()


def test_a_killed_trainer(cluster: FlinkCluster, export: str, tmp_path: Path) -> None:
    """Nobody tries again: it would most likely die again."""
    with training(cluster, export, tmp_path) as (job, trainer):
        trainer.kill()
        run = job.wait()
    told("a killed trainer", run)
    assert run.code == 1
    last = run.errors.splitlines()[-1]
    assert last.startswith(
        "failed: the training process was killed (SIGKILL): most likely the machine ran out of memory"
    )
    assert "Traceback" not in run.errors
    model = ModelFiles(str(tmp_path / "models")).get("model")
    assert (model["state"], f"failed: {model['error']}") == ("failed", last)
    soon(lambda: not cluster.workers())


def test_an_interrupted_run_stops_its_job(cluster: FlinkCluster, export: str, tmp_path: Path) -> None:
    with training(cluster, export, tmp_path) as (job, _):
        job.process.send_signal(signal.SIGINT)
        run = job.wait()
    told("an interrupted run", run)
    assert run.code == 1
    assert run.errors.splitlines()[-1] == "failed: interrupted"
    assert "Traceback" not in run.errors
    soon(lambda: not cluster.workers("transforms.trainer_process"), 10)
    soon(lambda: cluster.overview()["jobs-running"] == 0)
    soon(lambda: not cluster.workers())
    assert ModelFiles(str(tmp_path / "models")).get("model")["error"] == "interrupted"


def test_flags_of_the_runner_are_known(cluster: FlinkCluster) -> None:
    parse([*cluster.options, "--object_reuse", "--flink_conf_dir=/etc/flink"])
    with pytest.raises(RequestError, match=r"unknown flag --object_ruse; did you mean --object_reuse\?"):
        parse([*cluster.options, "--object_ruse"])


def test_search_contexts_of_a_killed_worker_expire(index: OpenSearchServer) -> None:
    """Nobody can close them: they live for two minutes, and the node looks once a minute. Other tests ran meanwhile."""
    soon(lambda: not open_contexts(index.client()))
