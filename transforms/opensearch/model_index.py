# SPDX-License-Identifier: Apache-2.0
"""The models of a cluster: their documents, their registrations, and the indices that use them.

A model lives in two places (`PUBLISHING.md`): a document in the system index `.opensearch-knn-models`, which holds the
blob, and a comma-separated string in that index's part of the cluster state, which is what makes the model usable. Only
the plugin's `_train` and `DELETE` write the latter; `_train` writes the document first and the string a moment later.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, FAILED, TrainedModel, blob_digest
from transforms.opensearch.session import ServerError, Session
from transforms.request import TrainingRequest

MODEL_INDEX = ".opensearch-knn-models"
MODELS = "/_plugins/_knn/models"

#: Fields of the registration string, in order; `ModelMetadata.toString` of the plugin since 2.17.
FIELDS = (
    "engine",
    "space_type",
    "dimension",
    "state",
    "timestamp",
    "description",
    "error",
    "training_node_assignment",
    "model_definition",
    "data_type",
    "mode",
    "compression_level",
    "model_version",
)
_FEWEST_FIELDS = 7
#: A search for models returns at most this many.
_MOST_MODELS = 1000


class NotPermitted(RequestError):
    """The cluster does not let this user do it."""


def call(session: Session, method: str, path: str, params: Mapping[str, Any] | None = None, body: Any = None) -> Any:
    """`session.json` with errors for users. Raises NotPermitted, RequestError or TrainingError."""
    try:
        return session.json(method, path, params, body)
    except ServerError as error:
        raise explain(session, error) from None


def explain(session: Session, error: ServerError) -> RequestError | TrainingError:
    """One line for users."""
    explained = session.explain(error)
    return NotPermitted(str(explained)) if error.status == 403 else explained


def cluster_version(session: Session) -> str:
    """The version of the node that answers, e.g. 3.6.0. Raises RequestError if it is no OpenSearch."""
    answer = call(session, "GET", "/")
    version = answer.get("version") if isinstance(answer, dict) else None
    if not isinstance(version, dict) or "number" not in version:
        raise session.no_opensearch()
    if "distribution" in version:
        return str(version["number"])
    try:
        answer = call(session, "GET", "/_nodes/_local", {"filter_path": "nodes.*.version"})
    except NotPermitted as error:
        raise NotPermitted(
            f"the cluster says that it is version {version['number']}, as a 2.x with "
            f"compatibility.override_main_response_version does: reset that, or let this user see its nodes ({error})"
        ) from None
    node = next(iter(session.named(session.named(answer).get("nodes")).values()), {})
    if node.get("version") in (None, version["number"]):  # an Elasticsearch
        raise session.no_opensearch()
    return str(node["version"])


# --- documents, through the plugin's own API -----------------------------------------------------------------------


def get_model(session: Session, model_id: str) -> dict[str, Any] | None:
    """The Get Model API's answer, `model_blob` in base64 included; None if there is no such document."""
    try:
        found = session.json("GET", f"{MODELS}/{quote(model_id, safe='')}")
    except ServerError as error:
        if error.status == 404:
            return None
        raise explain(session, error) from None
    if not isinstance(found, dict) or "state" not in found:
        raise session.no_opensearch()
    return found


def list_models(session: Session) -> list[dict[str, Any]]:
    """All models by id, without their blobs. Raises RequestError if there are more than a search returns."""
    body = {"size": _MOST_MODELS, "query": {"match_all": {}}, "_source": {"excludes": ["model_blob"]}}
    try:
        found = session.json("POST", f"{MODELS}/_search", None, body)
    except ServerError as error:
        if error.status == 404:  # the plugin makes the index with the first model
            return []
        raise explain(session, error) from None
    hits = found["hits"]
    if hits["total"]["value"] > len(hits["hits"]):
        raise RequestError(f"the cluster has {hits['total']['value']} models, {_MOST_MODELS} can be listed")
    return sorted(
        ({"model_id": hit["_id"], **hit["_source"]} for hit in hits["hits"]), key=lambda model: model["model_id"]
    )


def delete_model(session: Session, model_id: str) -> bool:
    """Deletes document and registration; False if there was no such model.

    The plugin itself looks for users of the model only among the top fields of indices with `index.knn`. It has the
    last word where this user may not see mappings.

    Raises:
      RequestError: indices use the model, or it is in training.
    """
    used: Mapping[str, list[str]] = {}
    with suppress(NotPermitted):
        used = usage(session, model_id)
    if used:
        raise RequestError(f'Model "{model_id}" is used by {show_usage(used)}: delete that first')
    try:
        session.json("DELETE", f"{MODELS}/{quote(model_id, safe='')}")
        return True
    except ServerError as error:
        if error.status == 404:
            return False
        raise explain(session, error) from None


def blob_of(model: Mapping[str, Any]) -> bytes:
    """The bytes in a Get Model answer; none while it is in training. Raises TrainingError if they are not base64."""
    try:
        return base64.b64decode(model.get("model_blob") or "", validate=True)
    except binascii.Error:
        raise TrainingError(f'the blob of model "{model.get("model_id")}" is not base64') from None


def fetch(session: Session, model_id: str) -> TrainedModel:
    """A model of the cluster with its blob. Raises RequestError if it does not exist or was not created."""
    found = get_model(session, model_id)
    if found is None:
        raise RequestError(f'Model "{model_id}" does not exist')
    if found["state"] != CREATED:
        reason = f": {found['error']}" if found.get("error") else ""
        raise RequestError(f'Model "{model_id}" is in state {found["state"]}, not created{reason}')
    blob = blob_of(found)
    metadata = {name: value for name, value in found.items() if name not in ("model_id", "model_blob")}
    return TrainedModel(model_id, metadata, blob, {"source": "cluster", **blob_digest(blob)})


# --- documents, written past the plugin ----------------------------------------------------------------------------


def may_write(session: Session) -> bool:
    """Whether this user may write to the model index. Asks for a write that cannot happen: of a document that does not
    exist, on the condition that it has a sequence number. The security plugin answers 403 before it comes to that.
    """
    path = f"/{MODEL_INDEX}/_doc/{quote('knn-train probe')}"
    condition = {"if_seq_no": 2**53, "if_primary_term": 1}
    try:
        session.json("DELETE", path, condition)  # unlike a PUT, it never creates the index
        session.json("PUT", path, condition, {})
    except ServerError as error:
        if error.status in (404, 409):
            return True
        if error.status == 403:
            return False
        raise explain(session, error) from None
    raise TrainingError(f"{MODEL_INDEX} accepted a write whose condition does not hold")


@dataclass(frozen=True)
class Document:
    """A model's raw document and what guards a write to it."""

    source: dict[str, Any]
    seq_no: int
    primary_term: int


def read_document(session: Session, model_id: str) -> Document:
    """The document as the plugin wrote it. Needs permission to read the system index."""
    try:
        found = session.json("GET", _document_path(model_id))
    except ServerError as error:
        if error.status == 404:  # the security plugin hides documents instead of refusing
            raise NotPermitted(
                f'the document of model "{model_id}" in {MODEL_INDEX} cannot be read by this user'
            ) from None
        raise explain(session, error) from None
    return Document(found["_source"], found["_seq_no"], found["_primary_term"])


def replace_blob(session: Session, model_id: str, document: Document, blob: bytes) -> None:
    """Writes `document` again with another blob, unless anyone has written it since it was read.

    All else stays as the cluster itself wrote it, so the fields are right for its version whatever that is, and agree
    with the registration. Not `_update`, which parses the blob and is held to its size limit.

    Raises:
      NotPermitted: the user may not write to a system index.
      TrainingError: someone else has changed the document.
    """
    params = {"refresh": "true", "if_seq_no": document.seq_no, "if_primary_term": document.primary_term}
    source = {**document.source, "model_blob": base64.b64encode(blob).decode()}
    try:
        session.json("PUT", _document_path(model_id), params, source)
    except ServerError as error:
        if error.status != 409:
            raise explain(session, error) from None
        # Also what a write that was sent again after its answer was lost gets to hear.
        if read_document(session, model_id).source.get("model_blob") != source["model_blob"]:
            raise TrainingError(f'the document of model "{model_id}" was changed by someone else meanwhile') from None


def _document_path(model_id: str) -> str:
    return f"/{MODEL_INDEX}/_doc/{quote(model_id, safe='')}"


# --- registrations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registration:
    """What the cluster state says of a model: the values of FIELDS, `model_definition` as an object.

    Attributes:
      text: the string itself.
      fields: older versions have fewer.
    """

    text: str
    fields: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Registration:
        """Raises TrainingError if the plugin could not read it either, commas in a failed training's error aside."""
        values = text.split(",")
        surplus = len(values) - len(FIELDS)
        if surplus > 0 and values[3] == FAILED:  # errors of the native library come as they are, commas included
            values[6 : 7 + surplus] = [",".join(values[6 : 7 + surplus])]
        if not _FEWEST_FIELDS <= len(values) <= len(FIELDS):
            raise TrainingError(
                f"the registration has {len(values)} fields, expected {_FEWEST_FIELDS} to {len(FIELDS)}: {text!r}"
            )
        fields: dict[str, Any] = dict(zip(FIELDS, values, strict=False))
        if not fields["dimension"].isdigit():
            raise TrainingError(f"the registration has dimension {fields['dimension']!r}: {text!r}")
        fields["dimension"] = int(fields["dimension"])
        if fields.get("model_definition"):
            fields["model_definition"] = parse_definition(fields["model_definition"])
        return cls(text, fields)

    @property
    def state(self) -> str:
        return str(self.fields["state"])

    def differences(self, request: TrainingRequest) -> list[str]:
        """What differs from a created model of `request`, one line each. Time and node are the cluster's own."""
        wanted: dict[str, Any] = {
            "engine": request.engine,
            "space_type": request.space_type,
            "dimension": request.dimension,
            "state": CREATED,
            "description": request.description,
            "error": "",
            "model_definition": request.model_definition,
            "data_type": request.data_type,
            "mode": request.mode or "",
            "compression_level": request.compression_level or "",
            "model_version": request.target_version,
        }
        return [
            f"{name} is {self.fields.get(name)!r}, expected {value!r}"
            for name, value in wanted.items()
            if self.fields.get(name) != value
        ]


def registration(session: Session, model_id: str) -> Registration | None:
    """A model's registration, None if it has none. Raises NotPermitted without `cluster:monitor/state`."""
    params = {"filter_path": "metadata.indices.*.knn-models"}
    try:
        found = call(session, "GET", f"/_cluster/state/metadata/{MODEL_INDEX}", params)
    except NotPermitted:
        # The security plugin guards the index by its name. Whoever may see the cluster state may see all of it: the
        # cluster has more to look through then, but sends no more.
        found = call(session, "GET", "/_cluster/state/metadata", params)
    index = (found or {}).get("metadata", {}).get("indices", {}).get(MODEL_INDEX, {})
    text = index.get("knn-models", {}).get(model_id)
    return None if text is None else Registration.parse(text)


def parse_definition(text: str) -> dict[str, Any]:
    """A method in the cluster state's notation, as JSON has it.

    `{name=ivf;parameters=[nlist=4;encoder={name=flat;parameters=[]};]}`: `;` ends a value, `$%$` stands for a comma
    (`MethodComponentContext.toClusterStateString`). Raises TrainingError.
    """
    component, rest = _component(text, text)
    if rest:
        raise TrainingError(f"the registration's method goes on after its end: {text!r}")
    return component


def _component(rest: str, whole: str) -> tuple[dict[str, Any], str]:
    head, found, rest = rest.partition(";parameters=[")
    if not found or not head.startswith("{name="):
        raise TrainingError(f"the registration's method cannot be read: {whole!r}")
    parameters: dict[str, Any] = {}
    while not rest.startswith("]}"):
        name, found, rest = rest.partition("=")
        if not found:
            raise TrainingError(f"the registration's method cannot be read: {whole!r}")
        if rest.startswith("{"):
            parameters[name], rest = _component(rest, whole)
            rest = rest.removeprefix(";")
        else:
            value, _, rest = rest.partition(";")
            parameters[name] = _value(value)
    return {"name": head.removeprefix("{name="), "parameters": parameters}, rest.removeprefix("]}")


def _value(text: str) -> int | bool | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.lstrip("-").isdigit() else text.replace("$%$", ",")


# --- who uses a model ----------------------------------------------------------------------------------------------


def usage(session: Session, model_id: str | None = None) -> dict[str, list[str]]:
    """Index name to the fields whose vectors are indexed with this model (or, without an id, any model: `field=id`).

    Sees the indices whose mappings this user may read. Raises NotPermitted if there are none.
    """
    params = {"expand_wildcards": "all", "filter_path": "**.model_id"}
    found = session.named(call(session, "GET", "/_mapping", params))
    used: dict[str, list[str]] = {}
    for index, entry in found.items():
        for field, used_id in _model_fields(entry.get("mappings", {})):
            if model_id is None or used_id == model_id:
                used.setdefault(index, []).append(field if model_id else f"{field}={used_id}")
    return used


def template_usage(session: Session) -> dict[str, list[str]]:
    """Model id to the index and component templates whose mappings name it, for the indices that are yet to be made.

    Raises NotPermitted.
    """
    used: dict[str, list[str]] = {}
    for kind, path, key in (
        ("index template", "/_index_template", "index_templates"),
        ("component template", "/_component_template", "component_templates"),
    ):
        found = call(session, "GET", path, {"filter_path": f"{key}.name,{key}.**.model_id"}) or {}
        for entry in found.get(key, []):
            template = entry.get(key.removesuffix("s"), {}).get("template", {})
            for _, model_id in _model_fields(template.get("mappings", {})):
                used.setdefault(model_id, []).append(f"{kind} {entry['name']}")
    return used


def _model_fields(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for group in ("properties", "fields"):
        for name, field in mapping.get(group, {}).items():
            if isinstance(field.get("model_id"), str):  # a property may itself be called model_id
                yield prefix + name, field["model_id"]
            yield from _model_fields(field, f"{prefix}{name}.")


def show_usage(used: Mapping[str, list[str]]) -> str:
    """`index a (field v), index b (fields v, w)`."""
    return ", ".join(
        f"index {index} (field{'s' if len(fields) > 1 else ''} {', '.join(fields)})" for index, fields in used.items()
    )
