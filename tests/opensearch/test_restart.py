# SPDX-License-Identifier: Apache-2.0
"""`knn-train` from a cluster that goes away while it is read, and comes back or does not."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines import train
from tests.opensearch.support import Proxy, assert_no_contexts, fill, vectors
from transforms.errors import TrainingError
from transforms.model_files import ModelFiles
from transforms.opensearch import session

METHOD = {"name": "ivf", "engine": "faiss", "space_type": "l2", "parameters": {"nlist": 4}}


@pytest.fixture(scope="module")
def index(opensearch_3):
    fill(opensearch_3, "interrupted", vectors(4000, 8), shards=2)
    return opensearch_3


def run(folder, url, *more):
    fields = {"training_index": "interrupted", "training_field": "vec", "dimension": "8", "method": json.dumps(METHOD)}
    words = [word for name, value in fields.items() for word in (f"--{name}", value)]
    where = ["--opensearch_url", url, "--model_dir", str(folder / "models"), "--temp_location", str(folder / "temp")]
    (folder / "temp").mkdir(exist_ok=True)
    return train.run([*words, *where, "--model_id", "m", "--overwrite", "--search_size", "100", *more])


def on_page(number, act):
    """A rule that does `act` when the page of that number is asked for; what `act` returns holds for all after it."""
    seen = [0]

    def rule(method, path, body):
        if path.startswith("/_search?"):
            seen[0] += 1
            if seen[0] >= number:
                return act(seen[0] == number)
        return None

    return rule


def test_a_killed_node_that_comes_back(index, tmp_path):
    """Its points in time are gone: new ones show the same documents, and the windows that were in flight are read
    again.
    """
    (before,) = run(tmp_path, index.url)
    away, back = threading.Event(), threading.Event()

    def wait_for_restart(first):
        if first:
            away.set()
            assert back.wait(300)

    # The node lives as long as the thread that started it, so this one restarts it while another trains.
    with Proxy(index.url) as proxy, ThreadPoolExecutor(1) as pool:
        # A few pages of the reading itself, after those that planning looks at.
        proxy.rule = on_page(7, wait_for_restart)
        trained = pool.submit(run, tmp_path, proxy.url)
        try:
            assert away.wait(60)
            index._kill(signal.SIGKILL)
            index.start()
        finally:
            back.set()
        (model,) = trained.result()
    assert model["provenance"]["blob_sha256"] == before["provenance"]["blob_sha256"]
    assert_no_contexts(index)


def test_a_node_that_does_not_come_back(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "_FIRST_WAIT_S", 0.01)
    line = r"^OpenSearch at http://127.0.0.1:\d+ cannot be reached: the connection was cut.* \(10 tries\)$"
    with Proxy(index.url) as proxy:
        proxy.rule = on_page(7, lambda first: "reset")
        with pytest.raises(TrainingError, match=line):
            run(tmp_path, proxy.url)
    failed = ModelFiles(str(tmp_path / "models")).get("m")
    assert failed["state"] == "failed"
    assert "cannot be reached" in failed["error"]
    assert "Traceback" not in "".join(capsys.readouterr())
    assert list((tmp_path / "temp").iterdir()) == []
    assert_no_contexts(index)
