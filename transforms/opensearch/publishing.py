# SPDX-License-Identifier: Apache-2.0
"""`publish` puts a trained model into a cluster, and `cleanup` sees to what dead runs left behind.

What can go wrong, and what each route needs, is told in `PUBLISHING.md`. The rule behind the order of things: the
temporary index is made first and removed last, so wherever a run is killed, a half-published model has a temporary
index of its name, and the next run with that id finishes it or takes it back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

import numpy as np

from transforms import faiss_training, progress
from transforms.codebooks import Codebooks, difference
from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, TRAINING, TrainedModel, sha256
from transforms.opensearch import model_index, temporary_index
from transforms.opensearch.model_index import MODELS, NotPermitted, Registration, call, explain
from transforms.opensearch.moving import request_at
from transforms.opensearch.routes import (
    AUTO,
    DELEGATE,
    NO_SIGHT,
    NO_WRITE,
    REPLAY,
    SWAP,
    Choice,
    arrives_as,
    choose,
    training_vectors,
)
from transforms.opensearch.session import ServerError, Session
from transforms.opensearch.temporary_index import FIELD, TemporaryIndex
from transforms.request import TrainingRequest
from transforms.vectors import NUMPY_TYPES, columns
from transforms.versions import NEWEST_TARGET, parse_version

_LOG = logging.getLogger("knn_train")

#: Seconds to wait for the cluster's own training: forever would hide a node that is stuck.
TRAINING_TIMEOUT_S = 3600.0
#: Seconds for the registration to follow the document, and for a training to end before its model can be taken back.
_SETTLE_S = 60.0
#: Seconds for the same where the user may not see the registration.
_UNSEEN_S = 2.0
_LONGEST_POLL_S = 2.0
#: Seconds for a training to show up whose request got no answer, before it is sent again.
_UNANSWERED_S = 10.0
#: What the plugin answers while the nodes have another training.
_BUSY = (
    "Validation Failed: 1: Cluster does not have capacity to train;",
    "Validation Failed: 1: Unable to run training job: No training capacity on node.;",
)
#: Fields of the registration that decide what the cluster does with the model.
_DECISIVE = ("engine", "space_type", "dimension", "state", "data_type", "mode", "compression_level")
#: A model may be this much older than the index it was trained from: clocks of two nodes differ.
_CLOCKS_MS = 60_000


@dataclass(frozen=True)
class PublishResult:
    """A published model.

    Attributes:
      model_id: of the model.
      route: `replay`, `swap` or `delegate`.
      explanation: why that route, in a sentence.
      exact: whether the cluster's codebooks are ours, bit by bit, as read back.
      blob_sha256: of the blob in the cluster.
      registration: the cluster state's string, None where the user may not read it.
      outcome: `published`, `resumed` from a run that was interrupted, or `present` already.
      warnings: what could not be checked, and what to know.
    """

    model_id: str
    route: str
    explanation: str
    exact: bool
    blob_sha256: str
    registration: str | None
    outcome: str = "published"
    warnings: tuple[str, ...] = ()


def publish(
    session: Session,
    model: TrainedModel,
    request: TrainingRequest,
    sample: Callable[[], np.ndarray] | None = None,
    route: str = AUTO,
    preference: str | None = None,
    verify: bool = True,
    allow_large_model: bool = False,
    keep_mark: bool = False,
) -> PublishResult:
    """Puts a model into a cluster and proves that it is there.

    Doing it again, whatever became of the first time, is safe: a model that is there is left alone, one that an
    interrupted run left behind is finished or replaced.

    Args:
      session: to the cluster; one publication of an id at a time.
      model: in state `created`.
      request: what it was trained for, as any version resolves it.
      sample: loads (n, columns) vectors, which may be normalised in place; only called for the route `delegate`.
      route: one of `routes.ROUTES`.
      preference: id of the data node that should train.
      verify: prove that the model can be used in a mapping and searched with.
      allow_large_model: publish what the cluster reads only with a raised limit.
      keep_mark: leave the temporary index, which tells a second publication of the same model that it was done, to
        `remove_marks`. For runners that may do a step twice.

    Raises:
      RequestError: the model, the route or the id cannot be used; nothing was changed.
      TrainingError: the cluster failed; what had been done was taken back, or is when the same call is made again.
    """
    if model.blob is None or model.state != CREATED:
        raise RequestError(
            f'Model "{model.model_id}" is in state {model.state}, not created: there is nothing to publish'
        )
    ready = _prepare(session, request, route, sample is not None, allow_large_model)
    _check_blob(model.blob, ready.request)
    _LOG.info(
        "publishing %s to OpenSearch %s: %s", model.model_id, ready.request.target_version, ready.choice.explanation
    )
    return _Publication(session, model.model_id, model.blob, ready, preference, verify).run(sample, keep_mark)


@dataclass(frozen=True)
class Ready:
    """What is known of a publication before it begins.

    Attributes:
      request: as the cluster's version resolves it.
      choice: the route, and why.
      warnings: for the user.
    """

    request: TrainingRequest
    choice: Choice
    warnings: tuple[str, ...]


def preflight(
    session: Session,
    model_id: str,
    request: TrainingRequest,
    route: str = AUTO,
    has_sample: bool = False,
    allow_large_model: bool = False,
) -> Ready:
    """What `publish` would do, before there is a model. Changes nothing.

    Raises:
      RequestError: this cluster cannot have such a model, the route cannot be taken, or the id is taken.
      TrainingError: the cluster cannot be reached.
    """
    ready = _prepare(session, request, route, has_sample, allow_large_model)
    if not temporary_index.find(session, model_id):  # what a killed run left is for `publish` to finish or to remove
        registration, used = None, {}
        with suppress(NotPermitted):
            registration = model_index.registration(session, model_id)
        with suppress(NotPermitted):
            used = model_index.usage(session, model_id)
        _refuse_taken(model_id, model_index.get_model(session, model_id), registration, used)
    return ready


def _prepare(
    session: Session, request: TrainingRequest, route: str, has_sample: bool, allow_large_model: bool
) -> Ready:
    version = model_index.cluster_version(session)
    request = request_at(request, version)
    warnings = request.check_limits(allow_large_model)
    if parse_version(version) > parse_version(NEWEST_TARGET):
        warnings.append(
            f"OpenSearch {version} is newer than {NEWEST_TARGET}, the newest that publishing was tested with"
        )
    choice = choose(route, request, _no_swap(session), has_sample)
    return Ready(request, choice, tuple(warnings))


def _no_swap(session: Session) -> str:
    """Why this user cannot swap; empty for one that can."""
    if not model_index.may_write(session):
        return NO_WRITE
    try:
        model_index.registration(session, "")  # any id will do, to see whether it may be asked for
    except NotPermitted:
        return NO_SIGHT
    return ""


def _refuse_taken(
    model_id: str,
    model: Mapping[str, Any] | None,
    registration: Registration | None,
    used: Mapping[str, list[str]],
) -> None:
    by = []
    if model is not None:
        by.append(f"a model in state {model['state']} of {model['timestamp']}")
    elif registration is not None:
        by.append("a registration in the cluster state without a document")
    if used:
        by.append(model_index.show_usage(used))
    if by:
        raise RequestError(f'Model id "{model_id}" is taken, by {" and ".join(by)}: choose another')


def remove_marks(session: Session, model_id: str) -> None:
    """Removes the temporary indices of a model that is published."""
    for index in temporary_index.find(session, model_id):
        index.delete(session)


def cleanup(session: Session, index: TemporaryIndex) -> str:
    """Removes what a dead run left behind: the temporary index and, where it may be incomplete, its model.

    Returns what was done, in words. Raises RequestError if the model cannot be removed; the index stays then.
    """
    done = f"removed index {index.name}"
    found = None if index.is_check else model_index.get_model(session, index.model_id)
    if found is not None and _younger(found, index):
        if _is_complete(found, index):
            done += f'; model "{index.model_id}" is complete and stays'
        else:
            _remove_model(session, index.model_id)
            done += f' and the unfinished model "{index.model_id}"'
    index.delete(session)
    return done


def unfinished(session: Session) -> dict[str, TemporaryIndex]:
    """Model id to temporary index, of the models that an interrupted run, or one still alive, has not finished."""
    found = {}
    for index in temporary_index.find(session):
        model = None if index.is_check else model_index.get_model(session, index.model_id)
        if model is not None and _younger(model, index) and not _is_complete(model, index):
            found[index.model_id] = index
    return found


def _is_complete(model: Mapping[str, Any], index: TemporaryIndex) -> bool:
    """Whether nothing was left to do but to check. Training begins when the index is full, so what it made is whole."""
    if model["state"] != CREATED:
        return False
    return index.purpose != SWAP or sha256(model_index.blob_of(model)) == index.blob_sha256


def _check_blob(blob: bytes, request: TrainingRequest) -> None:
    """Nothing in the cluster compares a blob with its registration: a wrong one crashes the node that loads it."""
    nothing = np.zeros((1, columns(request.dimension, request.data_type)), NUMPY_TYPES[request.data_type])
    try:
        faiss_training.check(blob, request, nothing)
    except TrainingError as error:
        raise RequestError(f"the model is not what its request says: {error}") from None


class _Publication:
    """One call of `publish`, once it is known what to do."""

    def __init__(
        self,
        session: Session,
        model_id: str,
        blob: bytes,
        ready: Ready,
        preference: str | None,
        verify: bool,
    ):
        self._session = session
        self._model_id = model_id
        self._blob = blob
        self._request = ready.request
        self._choice = ready.choice
        self._preference = preference
        self._verify = verify
        self._warnings = list(ready.warnings)
        self._sha256 = sha256(blob)
        self._codebooks = Codebooks.of(blob)
        self._expected = arrives_as(self._choice.route, self._request, self._codebooks)
        self._indices: list[TemporaryIndex] = []
        self._owns_model = False
        self._unanswered = False  # whether a model may yet come, of a try that got no answer

    def run(self, sample: Callable[[], np.ndarray] | None, keep_mark: bool) -> PublishResult:
        loaded = sample() if sample is not None and self._choice.route == DELEGATE else None
        vectors, documents = training_vectors(self._choice.route, self._request, self._codebooks, loaded)
        outcome = "resumed" if self._take_over() else "published"
        if outcome == "published":
            present = self._present()
            if present is not None:
                return present
        try:
            if outcome == "published":
                self._seed(vectors, documents)
            self._complete()
            result = self._proven(outcome)
        except BaseException:
            self._take_back()
            raise
        # All there are, not only our own: the one that a killed run had asked for may have come after we looked.
        for index in temporary_index.find(self._session, self._model_id):
            if index.is_check or not keep_mark:
                index.delete(self._session)
        return result

    # --- what is there already ---

    def _take_over(self) -> bool:
        """Whether an interrupted run left a model that can be finished. What cannot is removed."""
        _remove_checks(self._session, self._model_id)
        for index in temporary_index.find(self._session, self._model_id):
            found = model_index.get_model(self._session, self._model_id)
            if found is None:
                index.delete(self._session)
                continue
            if not _younger(found, index):
                # The run died before its training; someone else has taken the id since, or before.
                index.delete(self._session)
                continue
            ours = (index.purpose, index.blob_sha256) == (self._choice.route, self._sha256)
            if ours and self._outcome_of_training()["state"] == CREATED and self._may_be_finished():
                _LOG.info("finishing the publication of %s that was begun %s", self._model_id, index.started)
                self._indices.append(index)
                self._owns_model = True
                return True
            _LOG.info("removing what the run of %s left of model %s", index.started, self._model_id)
            _remove_model(self._session, self._model_id)
            index.delete(self._session)
        return False

    def _may_be_finished(self) -> bool:
        """A swap can finish any seed of the same registration; what a training was to leave has to be there."""
        registration = self._readable_registration()
        if registration is not None and self._decisive(registration.differences(self._request)):
            return False
        return self._choice.route != REPLAY or self._difference(self._stored_blob()) is None

    def _present(self) -> PublishResult | None:
        """The result if the very model is there. Raises RequestError if anything else has the id, saying what."""
        found = model_index.get_model(self._session, self._model_id)
        registration = self._readable_registration()
        used = self._usage()
        if found is not None and found["state"] == CREATED and self._expected is not None:
            blob = model_index.blob_of(found)
            same = self._difference(blob) is None and (self._choice.route != SWAP or blob == self._blob)
            if same and registration is not None and not registration.differences(self._request):
                return self._result("present", blob, registration)
        _refuse_taken(self._model_id, found, registration, used)
        return None

    # --- the steps ---

    def _seed(self, vectors: np.ndarray, documents: int) -> None:
        """The cluster's own training on a temporary index, which registers the model."""
        index = TemporaryIndex.named_for(self._model_id, self._choice.route, self._sha256)
        self._indices.append(index)  # first: if the answer to the creation is lost, there is still something to remove
        mapping = {"type": "knn_vector", "dimension": self._request.dimension, "data_type": self._request.data_type}
        if self._request.data_type == "binary":
            mapping["space_type"] = "hamming"
        index.create(self._session, mapping)
        index.fill(self._session, vectors, documents)
        self._start_training(index)
        trained = self._outcome_of_training()
        if trained["state"] != CREATED:
            raise TrainingError(f'the cluster could not train model "{self._model_id}": {trained.get("error")}')

    def _start_training(self, index: TemporaryIndex) -> None:
        body = self._request.body() | {"training_index": index.name, "training_field": FIELD}
        params = {"preference": self._preference} if self._preference else {}
        path = f"{MODELS}/{quote(self._model_id, safe='')}/_train"
        deadline = time.monotonic() + TRAINING_TIMEOUT_S
        for wait_s in _waits():
            earlier = self._unanswered
            self._owns_model = self._unanswered = True  # from here on there may be a model, even if no answer comes
            try:
                # Not sent again blindly: the second of two would be refused because of the first.
                self._session.send("POST", path, params, body, attempts=1)
                self._unanswered = False
                return
            except ServerError as error:
                if earlier and self._is_there():
                    return  # refused because of an earlier try, which did arrive
                self._owns_model = self._unanswered = earlier
                if error.reason not in _BUSY or time.monotonic() > deadline:
                    raise explain(self._session, error) from None
                _LOG.info("waiting: %s", error.reason)
            except TrainingError:
                if self._comes():
                    return
                if time.monotonic() > deadline:
                    raise
            _sleep(wait_s)

    def _comes(self) -> bool:
        """Whether a training that was not answered shows up: the cluster may still be at work on it."""
        deadline = time.monotonic() + _UNANSWERED_S
        for wait_s in _waits():
            if self._is_there() or time.monotonic() > deadline:
                break
            _sleep(wait_s)
        return not self._unanswered

    def _is_there(self) -> bool:
        if model_index.get_model(self._session, self._model_id) is None:
            return False
        self._unanswered = False
        return True

    def _outcome_of_training(self) -> Mapping[str, Any]:
        """`state` and `error` once the cluster's training has ended."""
        return _wait_for_training(self._session, self._model_id, TRAINING_TIMEOUT_S)

    def _complete(self) -> None:
        """From what `_train` left to the model that is wanted."""
        if self._choice.route == SWAP:
            self._swap()
        elif self._expected is not None:
            problem = self._difference(self._stored_blob())
            if problem is not None:
                raise TrainingError(f"the cluster arrived at other codebooks than it was given: {problem}")

    def _swap(self) -> None:
        registration = _wait_for_registration(self._session, self._model_id)
        if registration is None:
            raise TrainingError(f'model "{self._model_id}" was trained but is not registered')
        self._check_registration(registration)
        document = model_index.read_document(self._session, self._model_id)
        self._check_unused("before it is complete")
        model_index.replace_blob(self._session, self._model_id, document, self._blob)
        # An index that came in between may have segments of the seed's codebook.
        self._check_unused("before it was complete")

    def _check_unused(self, when: str) -> None:
        used = self._usage()
        if used and _remove_checks(self._session, self._model_id):
            used = self._usage()
        if used:
            raise TrainingError(
                f'model "{self._model_id}" is used {when}, by {model_index.show_usage(used)}: delete that first'
            )

    def _proven(self, outcome: str) -> PublishResult:
        blob = self._stored_blob()
        if self._choice.route == SWAP and blob != self._blob:
            raise TrainingError(f"the cluster returns a blob of SHA-256 {sha256(blob)}, expected {self._sha256}")
        if self._choice.route == DELEGATE and self._request.quantization_bits in (None, 1):
            _check_blob(blob, self._request)
        registration = self._readable_registration()
        if registration is not None:
            self._check_registration(registration)
        if self._verify:
            self._check_use()
        return self._result(outcome, blob, registration)

    def _check_use(self) -> None:
        """A mapping with the model is accepted, and a search finds the model created."""
        check = TemporaryIndex.named_for(self._model_id, "check", self._sha256)
        self._indices.append(check)
        check.create(self._session, {"type": "knn_vector", "model_id": self._model_id}, knn=True)
        query = {"knn": {FIELD: {"vector": [1] * columns(self._request.dimension, self._request.data_type), "k": 1}}}
        deadline = time.monotonic() + _SETTLE_S
        for wait_s in _waits():
            try:
                self._session.json("POST", f"/{check.name}/_search", None, {"size": 1, "query": query})
                break
            except ServerError as error:
                if "is not created" not in error.reason or time.monotonic() > deadline:
                    raise explain(self._session, error) from None
            _sleep(wait_s)
        check.delete(self._session)
        self._indices.remove(check)

    def _take_back(self) -> None:
        """After a failure or Ctrl-C: the model first, its mark last."""
        try:
            _remove_checks(self._session, self._model_id)
            if self._owns_model:
                if self._unanswered and not self._is_there():
                    raise TrainingError("no answer came to its training, which the cluster may still begin")
                _remove_model(self._session, self._model_id)
            for index in self._indices:
                index.delete(self._session)
        except (RequestError, TrainingError) as problem:
            _LOG.warning(
                'model "%s" may be in the cluster half done (%s): run the same command again, or knn-models cleanup',
                self._model_id,
                problem,
            )

    # --- what the steps are made of ---

    def _stored_blob(self) -> bytes:
        found = model_index.get_model(self._session, self._model_id)
        if found is None:
            raise TrainingError(f'model "{self._model_id}" has been deleted by someone else')
        return model_index.blob_of(found)

    def _difference(self, blob: bytes) -> str | None:
        return None if self._expected is None else difference(self._expected, Codebooks.of(blob))

    def _readable_registration(self) -> Registration | None:
        try:
            return _wait_for_registration(self._session, self._model_id)
        except NotPermitted:
            self._warn("the registration was not read: this user lacks cluster:monitor/state")
            return None

    def _usage(self) -> dict[str, list[str]]:
        """The indices that use the model, our own check aside."""
        try:
            used = model_index.usage(self._session, self._model_id)
        except NotPermitted:
            self._warn("whether an index uses the model was not checked: this user may not read mappings")
            return {}
        ours = {index.name for index in self._indices}
        return {index: fields for index, fields in used.items() if index not in ours}

    def _check_registration(self, registration: Registration) -> None:
        differences = registration.differences(self._request)
        decisive = self._decisive(differences)
        if decisive:
            raise TrainingError(
                f'the registration of model "{self._model_id}" is not what was asked for: {decisive[0]}'
            )
        for line in differences:
            self._warn(f"registration: {line}")

    def _decisive(self, differences: list[str]) -> list[str]:
        """All differences on the versions we know; on later ones, those that matter to an index."""
        if parse_version(self._request.target_version) <= parse_version(NEWEST_TARGET):
            return differences
        return [line for line in differences if line.partition(" is ")[0] in _DECISIVE]

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)

    def _result(self, outcome: str, blob: bytes, registration: Registration | None) -> PublishResult:
        return PublishResult(
            self._model_id,
            self._choice.route,
            self._choice.explanation,
            difference(self._codebooks, Codebooks.of(blob)) is None,
            sha256(blob),
            None if registration is None else registration.text,
            outcome,
            tuple(self._warnings),
        )


def _sleep(seconds: float) -> None:
    progress.advance("publish", 0)  # raises when the run was cancelled
    time.sleep(seconds)


def _wait_for_training(
    session: Session, model_id: str, timeout_s: float, sleep: Callable[[float], None] = _sleep
) -> Mapping[str, Any]:
    path = f"{MODELS}/{quote(model_id, safe='')}"
    deadline = time.monotonic() + timeout_s
    for wait_s in _waits():
        found = call(session, "GET", path, {"filter_path": "state,error"})
        if found["state"] != TRAINING:
            return dict(found)
        if time.monotonic() > deadline:
            break
        sleep(wait_s)
    raise TrainingError(f'model "{model_id}" is still in training after {timeout_s:.0f} s')


def _remove_model(session: Session, model_id: str) -> None:
    """Deletes a model once the plugin has written all it will write of it.

    A training cannot be cancelled, and its end shows in the document first: deleted in between, the model would be
    registered again afterwards, without a document, for good. A cancelled run takes back too, so these waits go on.
    """
    if model_index.get_model(session, model_id) is None:
        return
    _wait_for_training(session, model_id, _SETTLE_S, time.sleep)
    try:
        _wait_for_registration(session, model_id, time.sleep)
    except NotPermitted:
        time.sleep(_UNSEEN_S)
    while True:
        try:
            model_index.delete_model(session, model_id)
            return
        except RequestError:
            if not _remove_checks(session, model_id):
                raise


def _remove_checks(session: Session, model_id: str) -> bool:
    """Removes indices that only proved a model usable; whether there were any.

    They use the model, so it could be neither swapped nor deleted. The one that a killed run had asked for can appear
    after the next run has begun, so this is called wherever one is in the way.
    """
    checks = [index for index in temporary_index.find(session, model_id) if index.is_check]
    for index in checks:
        index.delete(session)
    return bool(checks)


def _wait_for_registration(
    session: Session, model_id: str, sleep: Callable[[float], None] = _sleep
) -> Registration | None:
    """The registration once it says that training has ended. Raises NotPermitted."""
    deadline = time.monotonic() + _SETTLE_S
    for wait_s in _waits():
        found = model_index.registration(session, model_id)
        if found is None or found.state != TRAINING or time.monotonic() > deadline:
            break
        sleep(wait_s)
    return found


def _younger(model: Mapping[str, Any], index: TemporaryIndex) -> bool:
    """Whether the model can have been trained from the index."""
    head = str(model["timestamp"]).rstrip("Z")[:19]
    trained_ms = datetime.fromisoformat(head + "+00:00").timestamp() * 1000
    return trained_ms > index.created_ms - _CLOCKS_MS


def _waits() -> Iterator[float]:
    wait_s = 0.05
    while True:
        yield wait_s
        wait_s = min(wait_s * 1.5, _LONGEST_POLL_S)
