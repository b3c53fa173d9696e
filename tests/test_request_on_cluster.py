# SPDX-License-Identifier: Apache-2.0
"""Real clusters refuse and resolve the rows of `test_request` in the same way."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from opensearchpy import OpenSearch, TransportError, helpers

from tests.opensearch_server import OpenSearchServer
from tests.test_request import MINIMA, REFUSED, RESOLVED, encoder, ivf, parse, plain
from transforms.errors import RequestError

VECTORS = 1000  # the fewest with which 2.19 trains whatever the method
DIMENSIONS = (16, 24)
NO_INDEX = re.compile(r'\d+: Index "train" does not exist\.;')


@pytest.fixture(scope="session")
def vectors() -> dict[tuple[str, int], np.ndarray]:
    rng = np.random.default_rng(3)
    rows: dict[tuple[str, int], np.ndarray] = {}
    for dimension in DIMENSIONS:
        rows["float", dimension] = rng.normal(1, 3, (VECTORS, dimension)).astype(np.float32)
        rows["byte", dimension] = rng.integers(-128, 128, (VECTORS, dimension), dtype=np.int8)
        rows["binary", dimension] = rng.integers(-128, 128, (VECTORS, dimension // 8), dtype=np.int8)
    return rows


@pytest.fixture
def client(opensearch: OpenSearchServer, vectors: dict[tuple[str, int], np.ndarray]) -> OpenSearch:
    """A client of a cluster that holds an index for each data type and dimension, as long as the session lasts."""
    client = opensearch.client()
    if client.indices.exists(index=index_name("float", DIMENSIONS[0])):
        return client
    for (data_type, dimension), rows in vectors.items():
        name = index_name(data_type, dimension)
        field: dict[str, Any] = {"type": "knn_vector", "dimension": dimension, "data_type": data_type}
        if data_type == "binary":
            field["space_type"] = "hamming"
        client.indices.create(index=name, body={"mappings": {"properties": {"vector": field}}})
        helpers.bulk(client, ({"_index": name, "vector": row} for row in rows.tolist()), refresh=True)
    return client


def index_name(data_type: str, dimension: int) -> str:
    return f"request-{data_type}-{dimension}"


def train(client: OpenSearch, body: dict[str, Any], model: str = "") -> None:
    path = "/".join(part for part in ("/_plugins/_knn/models", model, "_train") if part)
    client.transport.perform_request("POST", path, body=json.dumps(body))


def refusal(client: OpenSearch, body: dict[str, Any]) -> str:
    with pytest.raises(TransportError) as caught:
        train(client, body)
    assert isinstance(caught.value.info, dict)
    reason: str = caught.value.info["error"]["reason"]
    return reason


def trained(
    client: OpenSearch, body: dict[str, Any], use: Callable[[str], None] = lambda model: None
) -> dict[str, Any]:
    """The model document the cluster makes of this request; `use` may do something with the model of that id."""
    # An id of its own: for a moment after its deletion the plugin still knows a model.
    model = f"request-{uuid.uuid4()}"
    train(client, body, model)
    path = f"/_plugins/_knn/models/{model}"
    deadline = time.monotonic() + 60
    while True:
        document: dict[str, Any] = client.transport.perform_request("GET", path)
        if document["state"] != "training":
            if document["state"] == "created":
                use(model)
            client.transport.perform_request("DELETE", path)
            assert (document["state"], document["error"]) == ("created", "")
            return document
        assert time.monotonic() < deadline, "the training does not end"
        time.sleep(0.05)


def test_refuses_in_the_same_words(opensearch: OpenSearchServer, client: OpenSearch) -> None:
    """Most rows name an index that does not exist, so that a row our rules refuse wrongly trains nothing."""
    rows = [(name, body, message) for name, body, versions, message in REFUSED if opensearch.version in versions]
    assert len(rows) > 80
    different = {}
    for name, body, message in rows:
        assert isinstance(body, dict)
        if (body.get("data_type", "float"), body.get("dimension")) in (("byte", 16), ("binary", 16)):
            body = {**body, "training_index": index_name(body["data_type"], 16)}
        answer = NO_INDEX.sub("", refusal(client, body))
        # The plugin prints a set, whose order changes from one start of the JVM to the next.
        if answer.replace("[16, 1]", "[1, 16]") != message:
            different[name] = answer
    assert different == {}


SERVERS = {"2.19.1": "opensearch_2", "3.6.0": "opensearch_3"}


@pytest.mark.parametrize(
    ("opensearch", "body", "minimum"),
    [(SERVERS[version], body, minimum) for body, version, minimum in MINIMA if version in SERVERS and minimum],
    indirect=["opensearch"],
)
def test_refuses_too_few_documents(
    opensearch: OpenSearchServer, client: OpenSearch, body: dict[str, Any], minimum: int
) -> None:
    request = parse({**with_index(body), "max_training_vector_count": minimum - 1}, opensearch.version)
    with pytest.raises(RequestError) as ours:
        request.check_count(VECTORS, documents=VECTORS)
    assert refusal(client, request.body()) == str(ours.value)


def test_refuses_adc_with_two_bits(opensearch: OpenSearchServer, client: OpenSearch) -> None:
    body = with_index(ivf(encoder("binary", bits=2, enable_adc=True)))
    with pytest.raises(RequestError) as ours:
        parse(body, opensearch.version)
    assert refusal(client, body) == str(ours.value)


def with_index(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "training_index": index_name(body.get("data_type", "float"), body["dimension"])}


def possible(body: dict[str, Any], version: str) -> bool:
    try:
        parse(body, version).check_count(VECTORS, documents=VECTORS)
    except RequestError:
        return False
    return True


@pytest.mark.parametrize(
    ("opensearch", "body"),
    [
        pytest.param(SERVERS[version], with_index(body), id=f"{name} ({version})")
        for version in SERVERS
        for name, body, versions, *_ in RESOLVED
        if version in versions and possible(body, version)
    ],
    indirect=["opensearch"],
)
def test_resolves_alike(opensearch: OpenSearchServer, client: OpenSearch, body: dict[str, Any]) -> None:
    request = parse(body, opensearch.version)
    document = trained(client, body)
    training = opensearch.trainer.trainings[-1]
    assert document["model_definition"] == request.model_definition
    assert document.get("compression_level") == request.compression_level
    assert document.get("mode") == request.mode
    assert document["space_type"] == request.space_type
    assert document["data_type"] == request.data_type
    assert training.parameters["index_description"] == request.index_description
    assert training.kind == ("binary" if request.is_binary else request.data_type)
    if request.quantization_bits in (None, 1):  # with more bits the cluster trains too small a dimension
        assert training.blob is not None
        assert (training.dimension, len(training.blob)) == (request.trained_dimension, request.blob_bytes)


@pytest.mark.parametrize(
    ("space_type", "metric"), [("l2", "l2"), ("innerproduct", "innerproduct"), ("cosinesimil", "innerproduct")]
)
def test_trains_in_the_same_space(
    opensearch: OpenSearchServer, client: OpenSearch, space_type: str, metric: str
) -> None:
    body = with_index(plain(space_type=space_type))
    request = parse(body, opensearch.version)
    assert trained(client, body)["space_type"] == request.space_type == space_type
    assert opensearch.trainer.trainings[-1].parameters["spaceType"] == metric
    assert request.inner_product == (metric == "innerproduct")


def test_no_document_fits_a_model_for_cosine_of_bytes(opensearch: OpenSearchServer, client: OpenSearch) -> None:
    """Versions before 3.5 train one, and `check_limits` refuses it: vectors would have to be normalised."""
    body = with_index(plain(space_type="cosinesimil", data_type="byte"))
    if opensearch.version != "2.19.1":
        assert "does not support cosine similarity with byte vectors" in refusal(client, body)
        return

    def use(model: str) -> None:
        mapping = {"properties": {"vector": {"type": "knn_vector", "model_id": model}}}
        client.indices.create(index="cosine-of-bytes", body={"settings": {"index.knn": True}, "mappings": mapping})
        try:
            with pytest.raises(TransportError) as caught:
                client.index(index="cosine-of-bytes", body={"vector": [1] * 16})
            assert isinstance(caught.value.info, dict)
            assert caught.value.info["error"]["caused_by"]["reason"] == "Byte array normalization is not supported"
        finally:
            client.indices.delete(index="cosine-of-bytes")

    assert trained(client, body, use)["space_type"] == "cosinesimil"


def quantise(vectors: np.ndarray, bits: int) -> np.ndarray:
    """Packed bits of the `binary` encoder (`QuantizerHelper`, `BitPacker`), thresholds from these vectors."""
    mean, deviation = vectors.mean(axis=0), vectors.std(axis=0)
    coefficients = [-1 + 2 * (bit + 1) / (bits + 1) for bit in range(bits)]
    planes = [vectors > mean + coefficient * deviation for coefficient in coefficients]
    return np.packbits(np.concatenate(planes, axis=1), axis=1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_binary_encoder_trains_on_planes_of_bits(
    opensearch: OpenSearchServer, client: OpenSearch, vectors: dict[tuple[str, int], np.ndarray], bits: int
) -> None:
    body = with_index(ivf(encoder("binary", bits=bits), body={"dimension": 24}))
    request = parse(body, opensearch.version)
    trained(client, body)
    training = opensearch.trainer.trainings[-1]
    # The cluster takes each plane for a vector of its own; together they are the vectors a segment has.
    assert (training.dimension, len(training.vectors)) == (24, bits * VECTORS)
    theirs, ours = training.vectors.reshape(VECTORS, -1), quantise(vectors["float", 24], bits)
    assert ours.shape[1] * 8 == request.trained_dimension == 24 * bits
    # One shard returns documents in the order they came. A value at a threshold may fall on either side.
    assert np.unpackbits(theirs ^ ours).mean() < 0.001
