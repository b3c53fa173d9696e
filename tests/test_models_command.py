# SPDX-License-Identifier: Apache-2.0
"""`knn-models` where something is wrong: one line says what, and what can be done is done."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import models
from tests.opensearch_server import OpenSearchServer
from tests.publish_cases import CASES, DIMENSION
from transforms.errors import RequestError, TrainingError
from transforms.model_files import ModelFiles
from transforms.opensearch import OpenSearchConnection, OpenSearchVectors, Session, model_index, temporary_index
from transforms.opensearch.publishing import publish
from transforms.opensearch.temporary_index import TemporaryIndex


def failure(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    monkeypatch.setattr("sys.argv", ["knn-models", *words])
    with pytest.raises(SystemExit) as caught:
        models.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert isinstance(caught.value.code, int)
    return caught.value.code, line


# --- addresses of something else -----------------------------------------------------------------------------------


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    """Stands in for whatever has the address: a server that answers every request with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


OTHERS = [b"<!DOCTYPE html><title>Login</title>", b'{"status":"ok"}', b'{"version":"2.1"}', b'["ok"]', b'"ok"', b"\xff"]


@pytest.mark.parametrize("body", OTHERS)
@pytest.mark.parametrize(
    "command", ["get m1", "list", "delete m1", "usage", "cleanup", "prune p-* --keep 1", "publish"]
)
def test_what_is_no_opensearch_is_told_so(
    command: str,
    body: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command.split()
    if command == "publish":
        store(tmp_path)
        words += ["m1", "--model_dir", str(tmp_path)]
    with answering(body) as url:
        told = failure([*words, "--opensearch_url", url], monkeypatch, capsys)
    assert told == (2, f"error: {url} does not answer as an OpenSearch does: is the URL right?")


def test_an_elasticsearch_is_no_opensearch() -> None:
    with (
        answering(b'{"version":{"number":"8.17.0"},"nodes":{"version":{"version":"8.17.0"}}}') as url,
        Session(OpenSearchConnection(url)) as session,
        pytest.raises(RequestError, match="does not answer as an OpenSearch does"),
    ):
        model_index.cluster_version(session)


@pytest.mark.parametrize("body", OTHERS)
def test_what_is_no_opensearch_is_not_read(body: bytes) -> None:
    with answering(body) as url, pytest.raises(RequestError, match="does not answer as an OpenSearch does"):
        OpenSearchVectors(OpenSearchConnection(url), "products", "v", 4).slices()


# --- samples -------------------------------------------------------------------------------------------------------


def store(folder: Path) -> None:
    """Model m1 in files."""
    model = CASES["IVF-Flat"].model(CASES["IVF-Flat"].request("3.6.0"), "m1")
    files = ModelFiles(str(folder))
    files.claim("m1", model.json())
    files.write(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("several.npz", "several.npz has several arrays, expected one (.npy)"),
        ("empty.npy", "empty.npy cannot be read: No data left in file"),
        ("cut.npz", "cut.npz cannot be read: File is not a zip file"),
        ("wide.npy", f"wide.npy has (2, 3) float32, expected (n, {DIMENSION}) float32"),
    ],
)
def test_samples_that_cannot_be_used(
    opensearch_3: OpenSearchServer,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store(tmp_path)
    np.savez(tmp_path / "several.npz", a=np.zeros(1), b=np.zeros(1))
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cut.npz").write_bytes((tmp_path / "several.npz").read_bytes()[:100])
    np.save(tmp_path / "wide.npy", np.zeros((2, 3), np.float32))
    words = ["publish", "m1", "--model_dir", str(tmp_path), "--opensearch_url", opensearch_3.url]
    code, line = failure([*words, "--sample", str(tmp_path / name)], monkeypatch, capsys)
    assert (code, line) == (2, f"error: --sample {tmp_path}/{message}")


# --- one of many that fails ----------------------------------------------------------------------------------------


@pytest.fixture
def three(opensearch_3: OpenSearchServer) -> Iterator[Session]:
    """A cluster with models s-1 to s-3 with their marks, of which the plugin's deletion of s-1 fails."""
    case = CASES["IVF-Flat"]
    with Session(OpenSearchConnection(opensearch_3.url)) as session, pytest.MonkeyPatch.context() as broken:
        request = case.request(model_index.cluster_version(session))
        model = case.model(request)
        for number in (1, 2, 3):
            publish(session, replace(model, model_id=f"s-{number}"), request, verify=False)
        delete_model = model_index.delete_model

        def stuck(session: Session, model_id: str) -> bool:
            if model_id == "s-1":
                raise TrainingError("the node that holds it is stuck")
            return delete_model(session, model_id)

        broken.setattr(model_index, "delete_model", stuck)
        yield session
        broken.undo()
        for index in temporary_index.find(session):
            index.delete(session)
        for described in model_index.list_models(session):
            delete_model(session, described["model_id"])


def ids(session: Session) -> list[str]:
    """Of the models here; other tests use the cluster too."""
    listed = [described["model_id"] for described in model_index.list_models(session)]
    return [model_id for model_id in listed if model_id.startswith("s-")]


def test_prune_goes_on_after_a_failure(
    opensearch_3: OpenSearchServer, three: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match=r'^model "s-1": the node that holds it is stuck$'):
        models.run(["prune", "s-*", "--keep", "1", "--delete", "--opensearch_url", opensearch_3.url])
    found = {each["model_id"]: each["result"] for each in json.loads(capsys.readouterr().out)}
    assert found == {"s-3": "kept", "s-2": "deleted", "s-1": "failed"}
    assert ids(three) == ["s-1", "s-3"]


def test_cleanup_goes_on_after_a_failure(
    opensearch_3: OpenSearchServer, three: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        mark = TemporaryIndex.named_for(f"s-{number}", "swap", "0" * 64)
        mark.create(three, {"type": "knn_vector", "dimension": DIMENSION})
    with pytest.raises(TrainingError, match=r"^knn-train-s-1-\w+: the node that holds it is stuck$"):
        models.run(["cleanup", "--delete", "--opensearch_url", opensearch_3.url])
    (told,) = json.loads(capsys.readouterr().out)
    assert told.endswith('and the unfinished model "s-2"')
    assert ids(three) == ["s-1", "s-3"]
    assert [index.model_id for index in temporary_index.find(three)] == ["s-1"]
