# SPDX-License-Identifier: Apache-2.0
"""Publishing models to real clusters: every route and kind of model, ids that are taken, and runs that are interrupted.

What cannot be shown here is how the models search: the cluster's native library is a stand-in (`knn_bridge.py`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.test_pipeline import TestPipeline

from pipelines import models
from tests import knn_bridge
from tests.opensearch.support import Proxy
from tests.opensearch_server import OpenSearchServer
from tests.publish_cases import CASES, DIMENSION, Case
from transforms import progress
from transforms.codebooks import Codebooks, difference
from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, FAILED, TrainedModel, metadata, random_model_id, sha256
from transforms.opensearch import OpenSearchConnection, Session, model_index, publishing, temporary_index
from transforms.opensearch.model_index import MODEL_INDEX, get_model
from transforms.opensearch.publishing import PublishResult, cleanup, publish, unfinished
from transforms.opensearch.routes import DELEGATE, NO_WRITE, REPLAY, SWAP, choose
from transforms.opensearch.temporary_index import TemporaryIndex
from transforms.opensearch.writing import WriteToModelIndex, WriteToModelIndexResult, _PublishFn, _RemoveMarksFn
from transforms.request import TrainingRequest
from transforms.sampling import Sample
from transforms.spill import SpillWriter

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["transforms.opensearch.publishing", "tests.test_publishing"])


@pytest.fixture
def session(opensearch: OpenSearchServer) -> Iterator[Session]:
    with Session(OpenSearchConnection(opensearch.url)) as session:
        yield session
        _tidy(session)


@pytest.fixture
def session_3(opensearch_3: OpenSearchServer) -> Iterator[Session]:
    with Session(OpenSearchConnection(opensearch_3.url)) as session:
        yield session
        _tidy(session)


def _tidy(session: Session) -> None:
    """Every test must leave a cluster without temporary indices; the models it published are removed here."""
    left = [index.name for index in temporary_index.find(session)]
    for index in temporary_index.find(session):
        index.delete(session)
    for model in model_index.list_models(session):
        model_index.delete_model(session, model["model_id"])
    assert left == []


@dataclass(frozen=True)
class Trained:
    case: Case
    request: TrainingRequest
    model: TrainedModel

    def publish(self, session: Session, route: str = "auto", **options: Any) -> PublishResult:
        return publish(session, self.model, self.request, self.case.vectors, route, **options)


def trained(session: Session, name: str, **fields: Any) -> Trained:
    case = CASES[name]
    request = case.request(model_index.cluster_version(session), **fields)
    return Trained(case, request, case.model(request))


# --- routes --------------------------------------------------------------------------------------------------------

NO_REPLAY = ("IVF-PQ", "binary encoder")


@pytest.mark.parametrize("route", [REPLAY, SWAP, DELEGATE])
@pytest.mark.parametrize("name", list(CASES))
def test_every_route_for_every_kind_of_model(
    opensearch: OpenSearchServer, session: Session, name: str, route: str
) -> None:
    it = trained(session, name, description="of a test")
    if route == REPLAY and name in NO_REPLAY:
        with pytest.raises(RequestError, match="route replay is not possible"):
            it.publish(session, route)
        assert get_model(session, it.model.model_id) is None
        return
    result = it.publish(session, route)
    assert (result.route, result.outcome) == (route, "published")
    assert result.warnings == tuple(it.request.check_limits())

    found = model_index.fetch(session, it.model.model_id)
    assert found.blob is not None
    assert result.blob_sha256 == sha256(found.blob)
    assert result.exact == ((route, name) != (REPLAY, "byte"))  # delegates too: the bridge trains as we do
    if route == SWAP:
        assert found.blob == it.model.blob
    described = {**metadata(it.request, CREATED), "training_node_assignment": 0, "timestamp": 0}
    assert {**found.metadata, "training_node_assignment": 0, "timestamp": 0} == described
    seeded = opensearch.trainer.trainings[-1].vectors
    assert len(seeded) == (1200 if route == DELEGATE else 256 if name == "HNSW-PQ" else 16 if name == "IVF-PQ" else 8)


def test_a_swapped_model_looks_like_one_of_the_clusters_own(session: Session) -> None:
    it = trained(session, "IVF-PQ", description="of a test")
    own_id = random_model_id()
    publish(session, replace(it.model, model_id=own_id), it.request, it.case.vectors, DELEGATE)
    it.publish(session, SWAP)
    own, swapped = get_model(session, own_id), get_model(session, it.model.model_id)
    assert own is not None
    assert swapped is not None
    for field in ("timestamp", "training_node_assignment", "model_id"):
        assert own.pop(field) and swapped.pop(field)  # noqa: PT018
    # The bridge's training is ours, so even the blobs agree.
    assert swapped == own
    raw = [model_index.read_document(session, name).source for name in (own_id, it.model.model_id)]
    assert {**raw[0], "timestamp": 0, "model_id": 0} == {**raw[1], "timestamp": 0, "model_id": 0}


def test_published_bytes_survive_minus_zero_and_tiny_numbers(session: Session) -> None:
    it = trained(session, "IVF-Flat")
    assert it.model.blob is not None
    blob = bytearray(it.model.blob)
    at = blob.index(Codebooks.of(it.model.blob).coarse.tobytes())  # type: ignore[union-attr]
    odd = np.array([-0.0, 0.0, 1e-45, -1.1754944e-38, 3.4028235e38, 0.1, 1 / 3, 16777217], np.float32)
    blob[at : at + odd.nbytes] = odd.tobytes()
    result = publish(session, replace(it.model, blob=bytes(blob)), it.request, route=REPLAY)
    assert result.exact
    assert result.blob_sha256 == sha256(bytes(blob))


def test_the_cluster_reads_in_pages_of_the_request(opensearch: OpenSearchServer, session: Session) -> None:
    it = trained(session, "IVF-PQ", search_size=500)
    with Proxy(opensearch.url) as proxy, Session(OpenSearchConnection(proxy.url)) as behind:
        it.publish(behind, DELEGATE)
    (asked,) = (json.loads(body) for _, _, body in proxy.requests("/_train"))
    assert asked["search_size"] == 500


def test_auto_takes_the_best_route_there_is() -> None:
    def route(name: str, may_write: bool, has_sample: bool) -> str:
        choice = choose("auto", CASES[name].request("3.6.0"), "" if may_write else NO_WRITE, has_sample)
        assert choice.explanation.startswith(choice.route)
        return choice.route

    assert route("IVF-Flat", False, False) == REPLAY
    assert route("IVF-Flat", True, True) == REPLAY
    assert route("byte", True, True) == SWAP
    assert route("byte", False, True) == REPLAY
    assert route("IVF-PQ", True, True) == SWAP
    assert route("IVF-PQ", False, True) == DELEGATE
    with pytest.raises(RequestError, match="there is no sample"):
        route("IVF-PQ", False, False)


@pytest.mark.parametrize(
    ("route", "may_write", "has_sample", "message"),
    [
        (REPLAY, True, True, "route replay is not possible: an IVF-PQ cannot be replayed"),
        (SWAP, False, True, "route swap is not possible: this user may not write to .opensearch-knn-models"),
        (DELEGATE, True, False, "route delegate is not possible: there is no sample"),
        ("teleport", True, True, "route 'teleport' is not one of auto, replay, swap, delegate"),
    ],
)
def test_routes_that_cannot_be_taken(route: str, may_write: bool, has_sample: bool, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        choose(route, CASES["IVF-PQ"].request("3.6.0"), "" if may_write else NO_WRITE, has_sample)


def test_a_model_moves_to_another_version(opensearch_2: OpenSearchServer, session_3: Session) -> None:
    with Session(OpenSearchConnection(opensearch_2.url)) as session_2:
        it = trained(session_2, "IVF-SQfp16")
        it.publish(session_2)
        exported = model_index.fetch(session_2, it.model.model_id)
        model_index.delete_model(session_2, it.model.model_id)
    result = publish(session_3, exported, it.request)
    assert result.exact
    assert result.registration is not None
    assert "bits=16" in result.registration
    assert result.registration.endswith(",2x,3.6.0")


# --- ids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [REPLAY, SWAP])
def test_publishing_twice_is_publishing_once(session: Session, route: str) -> None:
    it = trained(session, "HNSW-PQ")
    first = it.publish(session, route)
    before = model_index.read_document(session, it.model.model_id)
    again = it.publish(session, route)
    assert (first.outcome, again.outcome) == ("published", "present")
    assert again.registration == first.registration
    assert model_index.read_document(session, it.model.model_id) == before


def refused(session: Session, it: Trained) -> str:
    with pytest.raises(RequestError) as raised:
        it.publish(session, SWAP)
    return str(raised.value)


def test_an_id_with_another_model_is_refused(session: Session) -> None:
    it = trained(session, "IVF-PQ")
    publish(session, it.case.model(it.request, it.model.model_id, seed=8), it.request, route=SWAP)
    before = model_index.read_document(session, it.model.model_id)
    assert "is taken, by a model in state created of 20" in refused(session, it)
    assert model_index.read_document(session, it.model.model_id) == before


def test_an_id_of_a_raw_document_is_refused(session: Session) -> None:
    it = trained(session, "IVF-PQ")
    it.publish(session)
    raw = replace(it, model=replace(it.model, model_id="by-hand"))
    source = model_index.read_document(session, it.model.model_id).source | {"model_id": "by-hand"}
    session.json("PUT", f"/{MODEL_INDEX}/_doc/by-hand", {"refresh": "true"}, source)
    assert "is taken, by a model in state created" in refused(session, raw)


def test_an_id_that_is_only_registered_is_refused(session: Session) -> None:
    it = trained(session, "IVF-PQ")
    it.publish(session)
    before = model_index.read_document(session, it.model.model_id)
    session.json("DELETE", f"/{MODEL_INDEX}/_doc/{it.model.model_id}", {"refresh": "true"})
    assert "a registration in the cluster state without a document" in refused(session, it)
    session.json("PUT", f"/{MODEL_INDEX}/_doc/{it.model.model_id}", {"refresh": "true"}, before.source)


def test_an_id_that_a_mapping_uses_is_refused(session: Session) -> None:
    it = trained(session, "IVF-PQ")
    mapping = {"properties": {"v": {"type": "knn_vector", "model_id": it.model.model_id}}}
    session.json("PUT", "/waits-for-model", None, {"settings": {"index.knn": True}, "mappings": mapping})
    try:
        assert refused(session, it).endswith("is taken, by index waits-for-model (field v): choose another")
    finally:
        session.json("DELETE", "/waits-for-model")
    assert get_model(session, it.model.model_id) is None


def test_odd_ids_are_published(session_3: Session) -> None:
    it = trained(session_3, "IVF-Flat")
    for model_id in ("Größe 1/2?&#", "x" * 512, "_train-me", "UPPER..case"):
        assert replace(it, model=replace(it.model, model_id=model_id)).publish(session_3).exact
        assert model_index.delete_model(session_3, model_id)


def test_a_model_that_is_not_what_it_says_is_refused(session_3: Session) -> None:
    it, other = trained(session_3, "IVF-PQ"), trained(session_3, "IVF-Flat")
    with pytest.raises(RequestError, match="not what its request says: the trained model has class IndexIVFFlat"):
        publish(session_3, replace(it.model, blob=other.model.blob), it.request)
    with pytest.raises(RequestError, match="state failed, not created: there is nothing to publish"):
        publish(session_3, TrainedModel("x", metadata(it.request, FAILED, "why")), it.request)
    assert model_index.list_models(session_3) == []


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_training_that_fails_leaves_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("out of luck, and memory")

    it = trained(session, "IVF-PQ")
    with monkeypatch.context() as broken:
        broken.setattr(knn_bridge, "train_as_the_plugin", fail)
        with pytest.raises(TrainingError, match=r"could not train model .*out of luck"):
            it.publish(session, SWAP)
        assert get_model(session, it.model.model_id) is None
        assert model_index.registration(session, it.model.model_id) is None
        assert temporary_index.find(session) == []
    assert it.publish(session, SWAP).outcome == "published"


def test_codebooks_that_come_back_different_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    it = trained(session, "IVF-Flat")
    other = it.case.model(it.request, seed=9).blob
    monkeypatch.setattr(knn_bridge, "train_as_the_plugin", lambda *_: other)
    with pytest.raises(TrainingError, match="other codebooks than it was given: 8 of 8 centroids differ"):
        it.publish(session, REPLAY)
    assert get_model(session, it.model.model_id) is None


def test_an_index_that_comes_too_early_stops_the_swap(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    it = trained(session, "IVF-PQ")
    replace_blob = model_index.replace_blob

    def and_meanwhile(*arguments: Any) -> None:
        mapping = {"properties": {"v": {"type": "knn_vector", "model_id": it.model.model_id}}}
        session.json("PUT", "/too-early", None, {"settings": {"index.knn": True}, "mappings": mapping})
        replace_blob(*arguments)

    monkeypatch.setattr(model_index, "replace_blob", and_meanwhile)
    with pytest.raises(TrainingError, match=r"used before it was complete, by index too-early \(field v\)"):
        it.publish(session, SWAP)
    assert len(temporary_index.find(session, it.model.model_id)) == 1  # the plugin keeps a model that is in use
    monkeypatch.undo()
    session.json("DELETE", "/too-early")
    assert it.publish(session, SWAP).outcome == "resumed"


#: Mappings that use a model where the plugin's own check before a deletion does not look.
UNSEEN_USES = {
    "object": {"doc": {"properties": {"v": {"type": "knn_vector", "model_id": "MODEL"}}}},
    "nested": {"doc": {"type": "nested", "properties": {"v": {"type": "knn_vector", "model_id": "MODEL"}}}},
}


@pytest.fixture(params=list(UNSEEN_USES))
def use(request: pytest.FixtureRequest, session: Session) -> Iterator[Callable[[str], None]]:
    """Makes index `deep-use`, which uses a model in field `doc.v`; it is gone after the test."""

    def make(model_id: str) -> None:
        properties = json.loads(json.dumps(UNSEEN_USES[request.param]).replace("MODEL", model_id))
        body = {"settings": {"index.knn": True}, "mappings": {"properties": properties}}
        session.json("PUT", "/deep-use", None, body)

    yield make
    session.json("DELETE", "/deep-use", {"ignore_unavailable": "true"})


USED_DEEP = r"is used by index deep-use \(field doc\.v\): delete that first"


def test_a_model_in_use_is_not_deleted(
    opensearch: OpenSearchServer, session: Session, use: Callable[[str], None]
) -> None:
    it = trained(session, "IVF-Flat")
    it.publish(session)
    use(it.model.model_id)
    with pytest.raises(RequestError, match=USED_DEEP):
        models.run(["delete", it.model.model_id, "--opensearch_url", opensearch.url])
    assert get_model(session, it.model.model_id) is not None
    session.json("DELETE", "/deep-use")
    models.run(["delete", it.model.model_id, "--opensearch_url", opensearch.url])


def test_an_unfinished_model_in_use_is_neither_taken_back_nor_cleaned_up(
    session: Session, use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it = trained(session, "IVF-PQ")

    def use_and_fail(*_: Any) -> None:
        use(it.model.model_id)
        raise TrainingError("the blob was not replaced")

    with monkeypatch.context() as broken:
        broken.setattr(model_index, "replace_blob", use_and_fail)
        with pytest.raises(TrainingError, match="not replaced"):
            it.publish(session, SWAP)
    assert re.search(USED_DEEP, caplog.text)
    (mark,) = temporary_index.find(session)
    with pytest.raises(RequestError, match=USED_DEEP):
        cleanup(session, mark)
    other = replace(it, model=it.case.model(it.request, it.model.model_id, seed=8))
    with pytest.raises(RequestError, match=USED_DEEP):
        other.publish(session, SWAP)
    assert get_model(session, it.model.model_id) is not None
    assert temporary_index.find(session) == [mark]
    session.json("DELETE", "/deep-use")
    cleanup(session, mark)
    assert get_model(session, it.model.model_id) is None


def test_a_document_that_changes_meanwhile_stops_the_swap(session_3: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    it = trained(session_3, "IVF-PQ")
    read_document = model_index.read_document

    def and_meanwhile(session: Session, model_id: str) -> model_index.Document:
        document = read_document(session, model_id)
        if monkeypatch_once.pop("go", None):
            path = f"/{MODEL_INDEX}/_doc/{model_id}"
            session.json("PUT", path, {"refresh": "true"}, document.source | {"description": "someone else's"})
        return document

    monkeypatch_once = {"go": True}
    monkeypatch.setattr(model_index, "read_document", and_meanwhile)
    with pytest.raises(TrainingError, match="was changed by someone else meanwhile"):
        it.publish(session_3, SWAP)
    assert get_model(session_3, it.model.model_id) is None


def test_a_busy_cluster_is_waited_for(opensearch_3: OpenSearchServer, session_3: Session) -> None:
    it, other = trained(session_3, "IVF-Flat"), trained(session_3, "IVF-PQ")
    with opensearch_3.trainer.held():
        first = PROCESSES.Process(target=_publish_in_process, args=(opensearch_3.url, other, SWAP))
        first.start()
        _wait_until(lambda: get_model(session_3, other.model.model_id) is not None)
        second = PROCESSES.Process(target=_publish_in_process, args=(opensearch_3.url, it, REPLAY))
        second.start()
        time.sleep(1)
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert len(model_index.list_models(session_3)) == 2


def test_a_refusal_for_good_is_not_waited_for(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publishing, "TRAINING_TIMEOUT_S", 3)
    caplog.set_level("INFO", "knn_train")
    it = trained(session, "IVF-Flat")
    with pytest.raises(RequestError, match='Preferred node "capacity" does not exist'):
        publish(session, it.model, it.request, route=REPLAY, preference="capacity")
    assert "waiting" not in caplog.text
    assert get_model(session, it.model.model_id) is None


class Delayed:
    """A rule for a proxy: the first `_train` is answered 504 at once, and delivered when `deliver` is called."""

    def __init__(self, session: Session, then: Callable[[Delayed], Any] = lambda it: None):
        self._session = session
        self._then = then  # at the second try
        self.tries: list[tuple[str, bytes]] = []

    def __call__(self, method: str, path: str, body: bytes) -> Any:
        if not path.endswith("/_train"):
            return None
        self.tries.append((path, body))
        return 504 if len(self.tries) == 1 else self._then(self)

    def deliver(self) -> None:
        path, body = self.tries[0]
        self._session.json("POST", path, None, json.loads(body))


def test_a_training_that_comes_late_is_not_asked_for_twice(opensearch: OpenSearchServer, session: Session) -> None:
    it = trained(session, "IVF-PQ")
    rule = Delayed(session)
    with Proxy(opensearch.url, rule) as proxy, Session(OpenSearchConnection(proxy.url)) as behind:
        late = threading.Thread(target=lambda: [_wait_until(lambda: bool(rule.tries)), time.sleep(1), rule.deliver()])
        late.start()
        assert it.publish(behind, SWAP).outcome == "published"
        late.join()
    assert len(rule.tries) == 1


def test_a_try_that_is_refused_because_of_the_one_before(
    opensearch: OpenSearchServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_UNANSWERED_S", 0.1)
    it = trained(session, "IVF-PQ")
    rule = Delayed(session, Delayed.deliver)
    with Proxy(opensearch.url, rule) as proxy, Session(OpenSearchConnection(proxy.url)) as behind:
        assert it.publish(behind, SWAP).outcome == "published"
    assert len(rule.tries) == 2
    assert model_index.fetch(session, it.model.model_id).blob == it.model.blob


def test_the_mark_stays_while_a_training_may_come(
    opensearch_3: OpenSearchServer,
    session_3: Session,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(publishing, "_UNANSWERED_S", 0.1)
    it = trained(session_3, "IVF-PQ")
    rule = Delayed(session_3, lambda _: 400)
    with (
        Proxy(opensearch_3.url, rule) as proxy,
        Session(OpenSearchConnection(proxy.url)) as behind,
        pytest.raises(RequestError, match="answers 400"),
    ):
        it.publish(behind, SWAP)
    assert "no answer came to its training" in caplog.text
    rule.deliver()
    _wait_until(lambda: (get_model(session_3, it.model.model_id) or {}).get("state") == CREATED)
    assert set(unfinished(session_3)) == {it.model.model_id}
    assert it.publish(session_3, SWAP).outcome == "resumed"


def test_the_mark_stays_where_the_request_itself_is_interrupted(
    opensearch_3: OpenSearchServer, session_3: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = trained(session_3, "IVF-PQ")
    send = Session.send

    def interrupted(self: Session, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("/_train"):
            raise KeyboardInterrupt
        return send(self, method, path, *arguments, **options)

    with monkeypatch.context() as broken:
        broken.setattr(Session, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            it.publish(session_3, SWAP)
    assert len(temporary_index.find(session_3)) == 1
    assert it.publish(session_3, SWAP).outcome == "published"


def test_a_version_yet_unknown_is_tried_with_a_warning(session_3: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_index, "cluster_version", lambda _: "3.99.0")
    it = trained(session_3, "IVF-PQ")
    result = it.publish(session_3)
    assert result.exact
    assert result.warnings[0].startswith("OpenSearch 3.99.0 is newer than")
    assert result.warnings[1] == "registration: model_version is '3.6.0', expected '3.99.0'"


# --- interruptions -------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    """A process that ends here and now: nothing is tidied up."""


KILL_POINTS: dict[str, tuple[Any, str]] = {
    "index created": (TemporaryIndex, "create"),
    "index filled": (TemporaryIndex, "fill"),
    "training started": (publishing._Publication, "_start_training"),
    "training ended": (publishing._Publication, "_outcome_of_training"),
    "document read": (model_index, "read_document"),
    "blob replaced": (model_index, "replace_blob"),
    "completed": (publishing._Publication, "_complete"),
    "proven": (publishing._Publication, "_proven"),
}


@pytest.mark.parametrize(
    ("route", "point"),
    [(SWAP, point) for point in KILL_POINTS]
    + [(route, point) for route in (REPLAY, DELEGATE) for point in ("index filled", "training started", "proven")],
)
def test_the_same_command_mends_a_killed_run(
    session: Session, monkeypatch: pytest.MonkeyPatch, point: str, route: str
) -> None:
    it = trained(session, "HNSW-PQ" if route == REPLAY else "IVF-PQ")
    owner, name = KILL_POINTS[point]
    step = getattr(owner, name)

    def and_die(*arguments: Any, **options: Any) -> None:
        step(*arguments, **options)
        raise _Killed

    with monkeypatch.context() as dying:
        dying.setattr(owner, name, and_die)
        dying.setattr(publishing._Publication, "_take_back", lambda self: None)
        with pytest.raises(_Killed):
            it.publish(session, route)
    # Whatever is there is marked as unfinished.
    left = get_model(session, it.model.model_id)
    assert len(temporary_index.find(session, it.model.model_id)) == 1
    if left is not None and route == SWAP and model_index.blob_of(left) != it.model.blob:
        assert set(unfinished(session)) == {it.model.model_id}

    result = it.publish(session, route)
    assert result.outcome == ("published" if left is None else "resumed")
    assert result.exact
    assert temporary_index.find(session) == []


def test_the_mark_outlives_a_failure_to_take_back(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster goes away in the middle: nothing can be undone, so the mark must stay."""
    it = trained(session, "IVF-PQ")

    def away(*_: Any) -> None:
        raise TrainingError("the cluster is away")

    with monkeypatch.context() as broken:
        broken.setattr(model_index, "replace_blob", away)
        broken.setattr(model_index, "delete_model", away)
        with pytest.raises(TrainingError, match="is away"):
            it.publish(session, SWAP)
    assert set(unfinished(session)) == {it.model.model_id}
    assert it.publish(session, SWAP).outcome == "resumed"


def test_another_model_replaces_an_unfinished_one(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    it = trained(session, "IVF-PQ")
    interrupt_before_swap(session, it, monkeypatch)
    other = replace(it, model=it.case.model(it.request, it.model.model_id, seed=8))
    assert other.publish(session, SWAP).outcome == "published"
    assert model_index.fetch(session, it.model.model_id).blob == other.model.blob


def test_an_unfinished_model_may_be_finished_by_another_route(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = trained(session, "IVF-PQ")
    interrupt_before_swap(session, it, monkeypatch)
    assert it.publish(session, DELEGATE).outcome == "published"


def test_cleanup_removes_what_is_unfinished_and_nothing_else(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    it, done = trained(session, "IVF-PQ"), trained(session, "IVF-PQ")
    interrupt_before_swap(session, it, monkeypatch)
    done.publish(session, SWAP, keep_mark=True)
    told = [cleanup(session, index) for index in temporary_index.find(session)]
    assert told[0].endswith(f'and the unfinished model "{it.model.model_id}"')
    assert told[1].endswith(f'; model "{done.model.model_id}" is complete and stays')
    assert [model["model_id"] for model in model_index.list_models(session)] == [done.model.model_id]
    assert temporary_index.find(session) == []


def test_a_model_older_than_the_mark_is_someone_elses(session_3: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    it = trained(session_3, "IVF-PQ")
    other = replace(it, model=it.case.model(it.request, it.model.model_id, seed=8))
    other.publish(session_3, SWAP)
    monkeypatch.setattr(publishing, "_CLOCKS_MS", 0)
    mark = TemporaryIndex.named_for(it.model.model_id, SWAP, "0" * 64)
    mark.create(session_3, {"type": "knn_vector", "dimension": DIMENSION})
    assert "is taken" in refused(session_3, it)
    assert model_index.fetch(session_3, it.model.model_id).blob == other.model.blob
    assert temporary_index.find(session_3) == []


def interrupt_before_swap(session: Session, it: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise _Killed

    with monkeypatch.context() as dying:
        dying.setattr(model_index, "replace_blob", die)
        dying.setattr(publishing._Publication, "_take_back", lambda self: None)
        with pytest.raises(_Killed):
            it.publish(session, SWAP)


def _publish_in_process(url: str, it: Trained, route: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background may ignore it
    with Session(OpenSearchConnection(url)) as session:
        it.publish(session, route)


def test_twenty_runs_killed_at_random_points(opensearch_3: OpenSearchServer, session_3: Session) -> None:
    rng = random.Random(4)
    found: dict[str, int] = {}
    for number in range(20):
        route, name = [(SWAP, "IVF-PQ"), (SWAP, "IVF-PQ"), (REPLAY, "HNSW-PQ"), (DELEGATE, "IVF-PQ")][number % 4]
        it = trained(session_3, name)
        process = PROCESSES.Process(target=_publish_in_process, args=(opensearch_3.url, it, route))
        process.start()
        _wait_for_mark(session_3, it.model.model_id)
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        process.join()
        left = get_model(session_3, it.model.model_id)
        marked = bool(temporary_index.find(session_3, it.model.model_id))
        usable = left is not None and left["state"] == CREATED and _is_ours(left, it)
        state = "nothing" if left is None else left["state"] + (" ours" if usable else " seed")
        found[f"{route}: {state}, {'marked' if marked else 'unmarked'}"] = (
            found.get(f"{route}: {state}, {'marked' if marked else 'unmarked'}", 0) + 1
        )
        assert marked or usable, "a model that is not whole has no mark"
        if marked or route != DELEGATE:
            it.publish(session_3, route)
        assert _is_ours(get_model(session_3, it.model.model_id) or {}, it)
        assert temporary_index.find(session_3) == []
        model_index.delete_model(session_3, it.model.model_id)
    print("\nwhat 20 killed runs left:", *(f"{count:3} x {what}" for what, count in sorted(found.items())), sep="\n")


def _is_ours(model: dict[str, Any], it: Trained) -> bool:
    blob = model_index.blob_of(model)
    return bool(blob) and difference(Codebooks.of(it.model.blob or b""), Codebooks.of(blob)) is None


@pytest.mark.parametrize("route", [SWAP, DELEGATE])
def test_ctrl_c_leaves_nothing(opensearch_3: OpenSearchServer, session_3: Session, route: str) -> None:
    it = trained(session_3, "IVF-PQ")
    with opensearch_3.trainer.held():
        process = PROCESSES.Process(target=_publish_in_process, args=(opensearch_3.url, it, route))
        process.start()
        _wait_until(lambda: get_model(session_3, it.model.model_id) is not None)
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.5)
    process.join(30)
    assert process.exitcode == 1
    assert get_model(session_3, it.model.model_id) is None
    assert temporary_index.find(session_3) == []


@pytest.mark.parametrize("route", [SWAP, DELEGATE])
def test_a_cancelled_run_leaves_nothing(opensearch_3: OpenSearchServer, session_3: Session, route: str) -> None:
    """As knn-train does on Ctrl-C: the steps are told to stop and find out when they next wait."""
    it = trained(session_3, "IVF-PQ")
    failures: list[Exception] = []

    def run() -> None:
        try:
            it.publish(session_3, route)
        except TrainingError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    try:
        with opensearch_3.trainer.held():
            thread.start()
            _wait_until(lambda: get_model(session_3, it.model.model_id) is not None)
            progress.cancel()
            time.sleep(0.5)
        thread.join(30)
    finally:
        progress.listen(None)
    assert [str(error) for error in failures] == ["interrupted"]
    assert get_model(session_3, it.model.model_id) is None
    assert temporary_index.find(session_3) == []


def _wait_for_mark(session: Session, model_id: str) -> None:
    _wait_until(lambda: bool(temporary_index.find(session, model_id)))


def _wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- as a pipeline step --------------------------------------------------------------------------------------------


def test_models_are_published_at_the_end_of_a_pipeline(
    opensearch_3: OpenSearchServer, session_3: Session, tmp_path: Any
) -> None:
    it = trained(session_3, "IVF-PQ")
    broken = TrainedModel("broken", metadata(it.request, FAILED, "too few vectors"))
    vectors = it.case.vectors()
    spills = SpillWriter(str(tmp_path))
    spills.append(np.arange(len(vectors), dtype=np.uint64), vectors, np.linspace(0, 1, len(vectors)))
    spill = spills.close()
    assert spill is not None
    with TestPipeline() as pipeline:
        samples = pipeline | "Sample" >> beam.Create([Sample(len(vectors), (spill,))])
        models = pipeline | "Models" >> beam.Create([it.model, broken])
        written = models | WriteToModelIndex(OpenSearchConnection(opensearch_3.url), it.request, DELEGATE, samples)
        written | beam.Map(_note, str(tmp_path))
    results = [(tmp_path / name).read_text() for name in (it.model.model_id, "broken")]
    assert "state='created', error='', route='delegate'" in results[0]
    assert "state='failed', error='too few vectors', route=None" in results[1]
    assert len(opensearch_3.trainer.trainings[-1].vectors) == len(vectors)


def _note(result: WriteToModelIndexResult, folder: str) -> None:
    Path(folder, result.model_id).write_text(repr(result))


@pytest.mark.parametrize("route", [SWAP, DELEGATE])
def test_a_bundle_done_twice_publishes_once(opensearch_3: OpenSearchServer, session_3: Session, route: str) -> None:
    it = trained(session_3, "IVF-PQ")
    connection = OpenSearchConnection(opensearch_3.url)
    options = {"route": route, "preference": None, "verify": True, "allow_large_model": False}
    publish_it = _PublishFn(connection, it.request, options)
    samples = [_Loaded(it.case.vectors())]
    before = len(opensearch_3.trainer.trainings)
    results = [list(publish_it.process(it.model, samples)) for _ in range(2)]
    assert [result.state for (result,) in results] == [CREATED, CREATED]
    assert results[0][0].blob_sha256 == results[1][0].blob_sha256
    assert opensearch_3.trainer.trainings.maxlen == before or len(opensearch_3.trainer.trainings) == before + 1
    list(_RemoveMarksFn(connection).process(results[0][0]))
    assert temporary_index.find(session_3) == []


@dataclass
class _Loaded:
    vectors: np.ndarray

    def load(self) -> np.ndarray:
        return self.vectors.copy()


def test_a_publication_that_fails_is_a_result() -> None:
    it = CASES["IVF-PQ"].request("3.6.0")
    options = {"route": "auto", "preference": None, "verify": True, "allow_large_model": False}
    function = _PublishFn(OpenSearchConnection("http://localhost:1"), it, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transforms.opensearch.session.ATTEMPTS", 1)
        patch.setattr("transforms.opensearch.session._FIRST_WAIT_S", 0.001)
        (result,) = function.process(CASES["IVF-PQ"].model(it))
    assert result.state == FAILED
    assert "cannot be reached" in result.error
