# SPDX-License-Identifier: Apache-2.0
"""Registrations, the models of a cluster, who uses them, and one model's names on two versions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.opensearch.support import Proxy
from tests.opensearch_server import OpenSearchServer
from tests.publish_cases import CASES
from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, metadata
from transforms.opensearch import OpenSearchConnection, Session, model_index, temporary_index
from transforms.opensearch.model_index import Registration, parse_definition
from transforms.opensearch.moving import request_of

REGISTERED = (
    "faiss,l2,16,created,2026-11-24T04:57:23.957Z,a test,,aW_k42jdTdW9fWQXSCvurg,{name=hnsw;parameters=[ef_search=256;"
    "ef_construction=256;encoder={name=pq;parameters=[code_size=8;m=4;]};m=16;]},float,,16x,2.19.1"
)


def test_a_registration_is_read() -> None:
    found = Registration.parse(REGISTERED)
    assert found.state == "created"
    assert found.fields == {
        "engine": "faiss",
        "space_type": "l2",
        "dimension": 16,
        "state": "created",
        "timestamp": "2026-11-24T04:57:23.957Z",
        "description": "a test",
        "error": "",
        "training_node_assignment": "aW_k42jdTdW9fWQXSCvurg",
        "model_definition": {
            "name": "hnsw",
            "parameters": {
                "ef_search": 256,
                "ef_construction": 256,
                "m": 16,
                "encoder": {"name": "pq", "parameters": {"code_size": 8, "m": 4}},
            },
        },
        "data_type": "float",
        "mode": "",
        "compression_level": "16x",
        "model_version": "2.19.1",
    }


def test_a_registration_is_compared_with_a_request() -> None:
    request = CASES["HNSW-PQ"].request("2.19.1", description="a test")
    assert Registration.parse(REGISTERED).differences(request) == []
    other = REGISTERED.replace(",created,", ",training,").replace("code_size=8;", "")
    assert [line.partition(" is ")[0] for line in Registration.parse(other).differences(request)] == [
        "state",
        "model_definition",
    ]


@pytest.mark.parametrize(
    ("text", "definition"),
    [
        ("{name=ivf;parameters=[]}", {"name": "ivf", "parameters": {}}),
        (
            "{name=ivf;parameters=[nlist=4;encoder={name=sq;parameters=[clip=false;type=fp16;]};nprobes=1;]}",
            {
                "name": "ivf",
                "parameters": {
                    "nlist": 4,
                    "encoder": {"name": "sq", "parameters": {"clip": False, "type": "fp16"}},
                    "nprobes": 1,
                },
            },
        ),
        ("{name=x;parameters=[a=one$%$two;]}", {"name": "x", "parameters": {"a": "one,two"}}),
    ],
)
def test_definitions_are_read(text: str, definition: dict[str, Any]) -> None:
    assert parse_definition(text) == definition


@pytest.mark.parametrize("text", ["ivf", "{name=ivf}", "{name=ivf;parameters=[nlist", "{name=ivf;parameters=[]}x"])
def test_broken_definitions_are_refused(text: str) -> None:
    with pytest.raises(TrainingError, match="registration's method"):
        parse_definition(text)


def test_commas_in_the_error_of_a_failed_training_are_read() -> None:
    text = REGISTERED.replace(",created,", ",failed,").replace("a test,,", "a test,in f(int, float), of x.cpp,")
    found = Registration.parse(text).fields
    assert (found["error"], found["model_version"]) == ("in f(int, float), of x.cpp", "2.19.1")


@pytest.mark.parametrize("text", ["faiss,l2", REGISTERED + ",more", REGISTERED.replace(",16,", ",x,")])
def test_broken_registrations_are_refused(text: str) -> None:
    with pytest.raises(TrainingError, match="the registration has"):
        Registration.parse(text)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(("old", "new"), [("2.19.1", "3.6.0"), ("3.6.0", "2.19.1")])
def test_a_model_has_a_request_on_another_version(name: str, old: str, new: str) -> None:
    case = CASES[name]
    moved = request_of(metadata(case.request(old, description="a test"), CREATED), new)
    expected = case.request(new, description="a test")
    assert moved.model_definition | {"parameters": 0} == expected.model_definition | {"parameters": 0}
    assert moved.index_description == expected.index_description
    assert (moved.target_version, moved.description, moved.space_type) == (new, "a test", expected.space_type)


def test_what_another_version_cannot_have_is_refused() -> None:
    on_disk = CASES["IVF-Flat"].request("3.6.0")
    one_bit = metadata(on_disk, CREATED) | {
        "model_definition": {"name": "ivf", "parameters": {"encoder": {"name": "sq", "parameters": {"bits": 1}}}}
    }
    with pytest.raises(RequestError, match="encoder"):
        request_of(one_bit, "2.19.1")
    with pytest.raises(RequestError, match="no model_definition"):
        request_of({"dimension": 4, "space_type": "l2"}, "3.6.0")


# --- on a cluster --------------------------------------------------------------------------------------------------


@pytest.fixture
def session(opensearch: OpenSearchServer) -> Iterator[Session]:
    with Session(OpenSearchConnection(opensearch.url)) as session:
        yield session


def test_what_does_not_exist(session: Session) -> None:
    assert model_index.get_model(session, "no such/model") is None
    assert model_index.registration(session, "no such/model") is None
    assert not model_index.delete_model(session, "no such/model")
    assert model_index.usage(session, "no such/model") == {}
    assert temporary_index.find(session, "no such/model") == []
    with pytest.raises(RequestError, match="does not exist"):
        model_index.fetch(session, "no such/model")


def test_asking_whether_one_may_write_writes_nothing(session: Session) -> None:
    before = session.json("GET", "/_cat/indices", {"format": "json", "h": "index,docs.count,docs.deleted"})
    assert model_index.may_write(session)
    assert session.json("GET", "/_cat/indices", {"format": "json", "h": "index,docs.count,docs.deleted"}) == before


def test_a_cluster_that_claims_another_version_is_seen_through(opensearch_2: OpenSearchServer) -> None:
    setting = "compatibility.override_main_response_version"
    with Session(OpenSearchConnection(opensearch_2.url)) as session:
        session.json("PUT", "/_cluster/settings", None, {"persistent": {setting: True}})
        try:
            assert session.json("GET", "/")["version"]["number"] == "7.10.2"
            assert model_index.cluster_version(session) == "2.19.1"
            with (
                Proxy(opensearch_2.url, lambda _, path, __: 403 if path.startswith("/_nodes") else None) as proxy,
                Session(OpenSearchConnection(proxy.url)) as less,
                pytest.raises(RequestError, match=setting),
            ):
                model_index.cluster_version(less)
        finally:
            session.json("PUT", "/_cluster/settings", None, {"persistent": {setting: None}})


def test_usage_names_index_and_field(session: Session) -> None:
    mapping = {
        "properties": {
            "model_id": {"type": "keyword"},
            "a": {"properties": {"v": {"type": "knn_vector", "model_id": "some-model"}}},
            "w": {"type": "knn_vector", "model_id": "another"},
        }
    }
    session.json("PUT", "/uses-models", None, {"settings": {"index.knn": True}, "mappings": mapping})
    try:
        assert model_index.usage(session, "some-model") == {"uses-models": ["a.v"]}
        assert model_index.usage(session)["uses-models"] == ["a.v=some-model", "w=another"]
    finally:
        session.json("DELETE", "/uses-models")
