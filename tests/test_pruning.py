# SPDX-License-Identifier: Apache-2.0
"""Ids from patterns, and the removal of a schedule's old models from files and from a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from pipelines import models
from pipelines.pruning import newest, verdicts
from tests.opensearch_server import OpenSearchServer
from tests.publish_cases import CASES
from transforms.errors import RequestError
from transforms.model import CREATED, FAILED, TRAINING
from transforms.model_files import ModelFiles
from transforms.model_ids import expand, matcher
from transforms.opensearch import OpenSearchConnection, Session, model_index
from transforms.opensearch.publishing import publish

AT = datetime(2026, 11, 24, 3, 4, 5, tzinfo=timezone.utc)
PATTERN = "products-{date}-{sha}"

# --- ids -----------------------------------------------------------------------------------------------------------


def test_placeholders_are_filled_in() -> None:
    assert expand("plain", AT, {}) == "plain"
    assert expand("p-{date}T{time}", AT, {}) == "p-20261124T030405"
    first = expand(PATTERN, AT, {"request": {"dimension": 8}, "seed": 0})
    assert first == expand(PATTERN, AT, {"seed": 0, "request": {"dimension": 8}})
    assert first != expand(PATTERN, AT, {"request": {"dimension": 8}, "seed": 1})
    assert matcher(PATTERN)(first)


@pytest.mark.parametrize("pattern", ["a-{day}", "a-{}", "a-{date", "a-date}", "{{date}}"])
@pytest.mark.parametrize("use", [lambda pattern: expand(pattern, AT, {}), matcher])
def test_other_braces_are_refused(pattern: str, use: Any) -> None:
    with pytest.raises(RequestError, match=r"expected one of \{date\}, \{time\}, \{sha\}"):
        use(pattern)


@pytest.mark.parametrize(
    ("pattern", "model_id", "matches"),
    [
        (PATTERN, "products-20261124-0123abcd", True),
        (PATTERN, "products-eu-20261124-0123abcd", False),
        (PATTERN, "products-20261124-0123abcd-2", False),
        ("products-*", "products-eu-20261124-0123abcd", True),
        ("pro.ucts-*", "products-1", False),
        ("products", "products", True),
    ],
)
def test_patterns_find_their_own_ids(pattern: str, model_id: str, matches: bool) -> None:
    assert matcher(pattern)(model_id) == matches


# --- verdicts ------------------------------------------------------------------------------------------------------


def model(model_id: str, day: int, state: str = CREATED, **more: Any) -> dict[str, Any]:
    return {"model_id": model_id, "state": state, "timestamp": f"2026-11-{day:02}T01:00:00.5Z", **more}


def test_what_is_kept_and_why() -> None:
    found = verdicts(
        [
            model("p-old", 1),
            model("p-serving", 2),
            model("p-failed-long-ago", 3, FAILED),
            model("p-second", 4),
            model("p-half", 5, unfinished="publication begun"),
            model("p-first", 6),
            model("p-failed", 7, FAILED),
            model("p-training", 1, TRAINING),
            model("other", 1),
        ],
        "p-*",
        2,
        {"p-serving": "index products (field v)"},
    )
    assert [(verdict.model_id, verdict.reason) for verdict in found] == [
        ("p-failed", "nothing newer was created"),
        ("p-first", "one of the 2 newest"),
        ("p-half", "its publication is not finished"),
        ("p-second", "one of the 2 newest"),
        ("p-failed-long-ago", ""),
        ("p-serving", "used by index products (field v)"),
        ("p-training", "in state training"),
        ("p-old", ""),
    ]


def test_the_time_is_compared_and_not_its_notation() -> None:
    times = ["2026-11-24T01:02Z", "2026-11-24T01:02:03Z", "2026-11-24T01:02:03.4Z", "2026-11-24T01:02:03.456789Z"]
    described = [{"model_id": f"m{9 - n}", "state": CREATED, "timestamp": time} for n, time in enumerate(times)]
    assert [verdict.timestamp for verdict in verdicts(described, "*", 9, {})] == times[::-1]
    assert newest(described, "*") == "m6"
    assert newest([{**each, "state": FAILED} for each in described], "*") is None


@pytest.mark.parametrize("keep", ["0", "-1"])
def test_at_least_one_is_kept(tmp_path: Path, keep: str) -> None:
    with pytest.raises(RequestError, match=f"keep is {keep}, expected 1 or more"):
        models.run(["prune", "p-*", "--keep", keep, "--model_dir", str(tmp_path), "--delete"])


# --- knn-models prune ----------------------------------------------------------------------------------------------


def prune(capsys: pytest.CaptureFixture[str], *words: str) -> dict[tuple[str, str], str]:
    models.run(["prune", *words])
    found = json.loads(capsys.readouterr().out)
    return {(each["place"], each["model_id"]): f"{each['result']}: {each['reason']}" for each in found}


def write(files: ModelFiles, described: dict[str, Any]) -> None:
    files.claim(described["model_id"], described)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ModelFiles(str(tmp_path))
    for day in (1, 2, 3):
        write(files, model(f"products-2026110{day}-0123abcd", day))
    write(files, model("products-eu", 1))
    words = [PATTERN, "--keep", "2", "--model_dir", str(tmp_path)]
    listed = prune(capsys, *words)
    assert list(listed.values()) == ["kept: one of the 2 newest"] * 2 + ["to delete: "]
    assert len(files.list()) == 4
    assert list(prune(capsys, *words, "--delete").values())[2] == "deleted: "
    assert [each["model_id"] for each in files.list()] == [
        "products-20261102-0123abcd",
        "products-20261103-0123abcd",
        "products-eu",
    ]


@pytest.fixture
def published(opensearch: OpenSearchServer) -> Iterator[Session]:
    """A cluster with models p-1 to p-4, p-1 used by an index and p-2 by a template."""
    case = CASES["IVF-Flat"]
    with Session(OpenSearchConnection(opensearch.url)) as session:
        request = case.request(model_index.cluster_version(session))
        trained = case.model(request)
        for number in range(1, 5):
            publish(session, replace(trained, model_id=f"p-{number}"), request, verify=False)
        knn = {"index.knn": True}
        session.json("PUT", "/products", None, {"settings": knn, "mappings": uses("p-1")})
        template = {"template": {"settings": knn, "mappings": uses("p-2")}}
        session.json("PUT", "/_component_template/p-vectors", None, template)
        session.json("PUT", "/_index_template/p-days", None, {"index_patterns": ["p-days-*"], **template})
        yield session
        for path in ("/products", "/_index_template/p-days", "/_component_template/p-vectors"):
            session.json("DELETE", path)
        for described in model_index.list_models(session):
            model_index.delete_model(session, described["model_id"])


def uses(model_id: str) -> dict[str, Any]:
    return {"properties": {"a": {"properties": {"v": {"type": "knn_vector", "model_id": model_id}}}}}


def test_clusters(
    opensearch: OpenSearchServer, published: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ModelFiles(str(tmp_path))
    for number in range(1, 5):
        write(files, model(f"p-{number}", number))
    words = ["p-*", "--keep", "1", "--opensearch_url", opensearch.url, "--model_dir", str(tmp_path)]
    expected = {
        "p-4": "kept: one of the 1 newest",
        "p-3": "to delete: ",
        "p-2": "kept: used by index template p-days, component template p-vectors",
        "p-1": "kept: used by index products (field a.v)",
    }
    listed = prune(capsys, *words)
    assert listed == {(place, each): text for place in ("model_dir", "cluster") for each, text in expected.items()}
    deleted = prune(capsys, *words, "--delete")
    assert deleted == {key: text.replace("to delete", "deleted") for key, text in listed.items()}
    for left in (files.list(), model_index.list_models(published)):
        assert [each["model_id"] for each in left] == ["p-1", "p-2", "p-4"]
    assert "p-3" not in {key[1] for key in prune(capsys, *words, "--delete")}


def may_not(*_: Any) -> None:
    raise model_index.NotPermitted("mappings are not for this user")


def test_what_the_plugin_knows_better_stays(
    opensearch_3: OpenSearchServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may not see every mapping; here nothing is seen, and the plugin itself refuses."""
    case = CASES["IVF-Flat"]
    monkeypatch.setattr(models.Cluster, "used", lambda *_, **__: {})
    monkeypatch.setattr(model_index, "usage", may_not)
    with Session(OpenSearchConnection(opensearch_3.url)) as session:
        request = case.request(model_index.cluster_version(session))
        for number in (1, 2):
            publish(session, replace(case.model(request), model_id=f"q-{number}"), request, verify=False)
        # The plugin looks at the fields at the top alone.
        mappings = uses("q-1")["properties"]["a"]
        session.json("PUT", "/hidden", None, {"settings": {"index.knn": True}, "mappings": mappings})
        try:
            found = prune(capsys, "q-*", "--keep", "1", "--opensearch_url", opensearch_3.url, "--delete")
            assert "in use" in found["cluster", "q-1"], found
            assert model_index.get_model(session, "q-1") is not None
        finally:
            session.json("DELETE", "/hidden")
            for number in (1, 2):
                model_index.delete_model(session, f"q-{number}")
