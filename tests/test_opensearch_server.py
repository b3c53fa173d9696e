# SPDX-License-Identifier: Apache-2.0
"""The test server itself: is it what the other tests take it for?"""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from opensearchpy import AuthenticationException, AuthorizationException, OpenSearch, SSLError, helpers

from tests.opensearch_security import MODEL_INDEX, SecureOpenSearchServer
from tests.opensearch_server import OpenSearchServer

DIMENSION, VECTORS = 16, 1200  # 2.19 refuses to train with fewer than 1000 documents


def test_runs_the_version_it_says_with_the_knn_plugin(opensearch: OpenSearchServer) -> None:
    client = opensearch.client()
    assert client.info()["version"]["number"] == opensearch.version
    assert "opensearch-knn" in {plugin["component"] for plugin in client.cat.plugins(format="json")}


def test_keeps_address_and_documents_over_a_restart(opensearch_3: OpenSearchServer) -> None:
    client = opensearch_3.client()
    url, pid = opensearch_3.url, opensearch_3.pid
    client.index(index="kept", id="1", body={"colour": "green"}, refresh=True)
    try:
        opensearch_3.restart()
        assert opensearch_3.url == url
        assert opensearch_3.pid != pid
        assert client.get(index="kept", id="1")["_source"] == {"colour": "green"}
    finally:
        client.indices.delete(index="kept")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent's life")
def test_dies_with_the_process_that_started_it(opensearch_3: OpenSearchServer) -> None:
    command = [sys.executable, "-m", "tests.opensearch_server", "start", opensearch_3.version, "--port", "0"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    try:
        assert parent.stdout is not None
        assert opensearch_3.version in parent.stdout.readline()
        (node,) = psutil.Process(parent.pid).children()
        run_dir = Path(node.cwd())
        parent.kill()
        node.wait(10)
        subprocess.run(["rm", "-r", run_dir], check=True)
    finally:
        parent.kill()
        parent.communicate()


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "float": rng.standard_normal((VECTORS, DIMENSION), dtype=np.float32),
        "byte": rng.integers(-128, 128, (VECTORS, DIMENSION), dtype=np.int8),
        "binary": rng.integers(0, 256, (VECTORS, DIMENSION // 8), dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def training_index(opensearch: OpenSearchServer, vectors: dict[str, np.ndarray]) -> Iterator[str]:
    client = opensearch.client()
    name = "server-self-test"
    fields: dict[str, Any] = {
        kind: {"type": "knn_vector", "dimension": DIMENSION, "data_type": kind} for kind in vectors
    }
    fields["binary"]["space_type"] = "hamming"
    client.indices.create(index=name, body={"mappings": {"properties": fields}})
    columns = {"float": vectors["float"], "byte": vectors["byte"], "binary": vectors["binary"].view(np.int8)}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    helpers.bulk(client, ({"_index": name, **dict(zip(columns, row, strict=True))} for row in rows), refresh=True)
    yield name
    client.indices.delete(index=name)


@pytest.fixture
def model(opensearch: OpenSearchServer) -> Iterator[str]:
    name = "server-self-test"
    yield name
    opensearch.client().transport.perform_request("DELETE", f"/_plugins/_knn/models/{name}")


def start_training(client: OpenSearch, model: str, index: str, kind: str, method: dict[str, Any]) -> None:
    body = {"training_index": index, "training_field": kind, "dimension": DIMENSION, "data_type": kind}
    body["method"] = {"engine": "faiss", "space_type": "hamming" if kind == "binary" else "l2", **method}
    client.transport.perform_request("POST", f"/_plugins/_knn/models/{model}/_train", body=body)


def state(client: OpenSearch, model: str) -> dict[str, Any]:
    document: dict[str, Any] = client.transport.perform_request("GET", f"/_plugins/_knn/models/{model}")
    return document


def outcome(client: OpenSearch, model: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        document = state(client, model)
        if document["state"] != "training":
            return document
        time.sleep(0.1)
    raise TimeoutError(model)


def ivf(**parameters: Any) -> dict[str, Any]:
    return {"name": "ivf", "parameters": {"nlist": 8, "nprobes": 3, **parameters}}


PQ = {"name": "pq", "parameters": {"m": 4, "code_size": 8}}


@pytest.mark.parametrize(
    ("kind", "method", "description"),
    [
        pytest.param("float", ivf(), "IVF8,Flat", id="ivf"),
        pytest.param("float", ivf(encoder=PQ), "IVF8,PQ4x8", id="ivf-pq"),
        pytest.param("float", {"name": "hnsw", "parameters": {"encoder": PQ}}, "HNSW16,PQ4", id="hnsw-pq"),
        pytest.param("float", ivf(encoder={"name": "sq"}), "IVF8,SQfp16", id="ivf-sq"),
        pytest.param("byte", ivf(), "IVF8,SQ8_direct_signed", id="byte"),
        pytest.param("binary", ivf(), "BIVF8,Flat", id="binary"),
    ],
)
def test_train_runs_in_the_plugin_with_the_bridge(
    opensearch: OpenSearchServer,
    training_index: str,
    model: str,
    vectors: dict[str, np.ndarray],
    kind: str,
    method: dict[str, Any],
    description: str,
) -> None:
    if description.endswith("SQfp16"):
        sq = {"bits": 16} if opensearch.version.startswith("3") else {"type": "fp16"}
        method = ivf(encoder={"name": "sq", "parameters": sq})
    client = opensearch.client()
    start_training(client, model, training_index, kind, method)
    document = outcome(client, model)

    assert (document["state"], document["error"]) == ("created", "")
    training = opensearch.trainer.trainings[-1]
    assert training.parameters["index_description"] == description
    assert base64.b64decode(document["model_blob"]) == training.blob
    assert sorted(training.vectors.tolist()) == sorted(vectors[kind].tolist())

    served = f"served-{model}"
    mapping = {"properties": {"v": {"type": "knn_vector", "model_id": model}}}
    created = client.indices.create(index=served, body={"settings": {"index.knn": True}, "mappings": mapping})
    client.indices.delete(index=served)
    assert created["acknowledged"]


def test_a_training_that_fails_leaves_its_reason(opensearch: OpenSearchServer, training_index: str, model: str) -> None:
    client = opensearch.client()
    start_training(client, model, training_index, "float", {"name": "ivf", "parameters": {"nlist": VECTORS + 1}})
    document = outcome(client, model)
    assert document["state"] == "failed"
    assert "Number of training points (1200) should be at least" in document["error"]


def test_a_training_can_be_held(opensearch_3: OpenSearchServer, request: pytest.FixtureRequest) -> None:
    client = opensearch_3.client()
    client.indices.create(
        index="held",
        body={"mappings": {"properties": {"float": {"type": "knn_vector", "dimension": DIMENSION}}}},
    )
    request.addfinalizer(lambda: client.indices.delete(index="held"))
    helpers.bulk(client, ({"_index": "held", "float": [float(i)] * DIMENSION} for i in range(20)), refresh=True)
    with opensearch_3.trainer.held():
        start_training(client, "held", "held", "float", ivf())
        time.sleep(0.5)
        assert state(client, "held")["state"] == "training"
    assert outcome(client, "held")["state"] == "created"
    client.transport.perform_request("DELETE", "/_plugins/_knn/models/held")


def test_names_the_reason_when_it_does_not_start() -> None:
    server = OpenSearchServer("3.6.0", settings={"no.such.setting": 1})
    try:
        with pytest.raises(RuntimeError, match=r"unknown setting \[no.such.setting\]"):
            server.start()
        assert server.pid is None
    finally:
        server.close()


def may_open_a_pit(client: OpenSearch, index: str) -> bool:
    try:
        pit = client.create_pit(index=index, params={"keep_alive": "1m"})["pit_id"]
    except AuthorizationException:
        return False
    client.delete_pit(body={"pit_id": [pit]})
    return True


def may_search(client: OpenSearch, index: str) -> bool:
    try:
        scroll = client.search(index=index, params={"scroll": "1m"})["_scroll_id"]
        client.clear_scroll(scroll_id=scroll)
    except AuthorizationException:
        return False
    return True


def test_users_may_do_what_their_roles_say(opensearch_secure: SecureOpenSearchServer) -> None:
    trainer = opensearch_secure.client("trainer")
    index = "knn-train-rights"
    trainer.indices.create(index=index)
    trainer.bulk(index=index, body=[{"index": {}}, {"colour": "green"}], params={"refresh": "true"})
    clients = {user: opensearch_secure.client(user) for user in opensearch_secure.users}
    try:
        rights = {user: (may_search(client, index), may_open_a_pit(client, index)) for user, client in clients.items()}
    finally:
        trainer.indices.delete(index=index)
    assert rights == {
        "admin": (True, True),
        "trainer": (True, True),
        "reader_nopit": (True, False),
        "nobody_user": (False, False),
    }
    with pytest.raises(AuthorizationException):
        trainer.indices.create(index="another-name")


def test_only_the_admin_certificate_writes_to_the_model_index(opensearch_secure: SecureOpenSearchServer) -> None:
    with pytest.raises(AuthorizationException):
        opensearch_secure.client("admin").index(index=MODEL_INDEX, id="by-hand", body={})
    holder = opensearch_secure.admin_client()
    assert holder.index(index=MODEL_INDEX, id="by-hand", body={})["result"] == "created"
    holder.indices.delete(index=MODEL_INDEX)  # so that the plugin makes its own when it needs one


def test_an_ordinary_user_may_train(opensearch_secure: SecureOpenSearchServer) -> None:
    client = opensearch_secure.client("trainer")
    index = "knn-train-few"
    mapping = {"properties": {"float": {"type": "knn_vector", "dimension": DIMENSION}}}
    client.indices.create(index=index, body={"mappings": mapping})
    try:
        rows = ({"_index": index, "float": [float(i)] * DIMENSION} for i in range(1000))
        helpers.bulk(client, rows, refresh=True)
        start_training(client, "few", index, "float", ivf())
        assert outcome(client, "few")["state"] == "created"
        client.transport.perform_request("DELETE", "/_plugins/_knn/models/few")
    finally:
        client.indices.delete(index=index)


def test_certificates_are_what_their_names_say(opensearch_secure: SecureOpenSearchServer) -> None:
    server = opensearch_secure
    own = server.client(user=None, client_cert=server.client_cert, client_key=server.client_key)
    assert own.transport.perform_request("GET", "/_plugins/_security/authinfo")["user_name"] == "trainer"
    with pytest.raises(AuthenticationException):
        server.client(user=None).info()
    with pytest.raises(SSLError, match="certificate verify failed"):
        server.client(ca_certs=server.other_ca, max_retries=0).info()
    expired = {"client_cert": server.expired_client_cert, "client_key": server.expired_client_key}
    with pytest.raises(SSLError, match="certificate unknown"):
        server.client(user=None, max_retries=0, **expired).info()
