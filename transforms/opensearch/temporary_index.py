# SPDX-License-Identifier: Apache-2.0
"""Temporary indices: what `_train` reads, and the mark of a publication that has not come to its end.

Each says in its mapping's `_meta` which model it is for. It is the first thing a publication makes and the last it
removes, so as long as there is one, the model of that name is not to be trusted; the next run with the same id finds it
and finishes or undoes what the dead run began.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from transforms.errors import TrainingError
from transforms.model import now
from transforms.opensearch.model_index import call, explain
from transforms.opensearch.session import ServerError, Session

PREFIX = "knn-train-"
FIELD = "vector"
_META, _META_FIELDS = "knn_train", ("model_id", "purpose", "blob_sha256", "started")
_BULK_BYTES = 4_000_000
#: Longest part of a model id in an index name, which may have 255 bytes.
_ID_LENGTH = 100


@dataclass(frozen=True)
class TemporaryIndex:
    """A temporary index and what it says of itself.

    Attributes:
      name: `knn-train-<model id, made safe>-<random>`.
      model_id: the model it is for.
      purpose: `replay`, `swap`, `delegate`, or `check` for the one that proves the model usable.
      blob_sha256: of the blob that is being published.
      started: when, in UTC, by the clock of the machine that runs the publication.
      created_ms: when, in milliseconds since 1970, by the cluster's clock; 0 if not known.
    """

    name: str
    model_id: str
    purpose: str
    blob_sha256: str
    started: str
    created_ms: int = 0

    @classmethod
    def named_for(cls, model_id: str, purpose: str, blob_sha256: str) -> TemporaryIndex:
        safe = re.sub(r"[^a-z0-9_.-]", "_", model_id.lower())[:_ID_LENGTH]
        return cls(f"{PREFIX}{safe}-{secrets.token_hex(4)}", model_id, purpose, blob_sha256, now())

    @property
    def is_check(self) -> bool:
        return self.purpose == "check"

    def create(self, session: Session, field: dict[str, Any], knn: bool = False) -> None:
        """Creates the index with one vector field; `knn` only where the field has a model."""
        settings: dict[str, Any] = {"hidden": True, "number_of_shards": 1, "number_of_replicas": 0, "knn": knn}
        if not knn:
            settings["refresh_interval"] = "-1"  # one refresh, when all documents are in
        meta = {name: value for name, value in asdict(self).items() if name in _META_FIELDS}
        mappings = {"_meta": {_META: meta}, "dynamic": False, "properties": {FIELD: field}}
        try:
            session.json("PUT", f"/{self.name}", None, {"settings": {"index": settings}, "mappings": mappings})
        except ServerError as error:
            # The name is random: it is there already only if the answer to an earlier try was lost.
            if error.type != "resource_already_exists_exception":
                raise explain(session, error) from None

    def fill(self, session: Session, vectors: np.ndarray, documents: int) -> None:
        """Writes `vectors`, a document each, and as many without a vector as it takes to have `documents`.

        Args:
          vectors: (n, columns) float32, int8, or packed uint8.
          documents: 2.19 counts documents, with or without a vector, before it trains.
        """
        for body in _bulk_bodies(vectors, documents):
            answer = call(session, "POST", f"/{self.name}/_bulk", {"filter_path": "errors,items.*.error"}, body)
            if answer["errors"]:
                problem = next(item["index"]["error"] for item in answer["items"] if item)
                raise TrainingError(f"the temporary index refuses a vector: {problem.get('reason')}")
        call(session, "POST", f"/{self.name}/_refresh")

    def delete(self, session: Session) -> None:
        try:
            session.json("DELETE", f"/{self.name}")
        except ServerError as error:
            if error.status != 404:
                raise explain(session, error) from None


def find(session: Session, model_id: str | None = None) -> list[TemporaryIndex]:
    """Temporary indices, of one model or all; whether their run is alive cannot be told.

    The order is that in which they are to be removed: first those that use a model, which keep it from being deleted.
    """
    filter_path = f"*.mappings._meta.{_META},*.settings.index.creation_date"
    answer = call(session, "GET", f"/{PREFIX}*", {"expand_wildcards": "all", "filter_path": filter_path})
    found = []
    for name, entry in session.named(answer).items():
        meta = entry.get("mappings", {}).get("_meta", {}).get(_META)
        if meta is None:  # an index of that name which we did not make
            continue
        created_ms = int(entry["settings"]["index"]["creation_date"])
        told = {key: str(meta.get(key, "")) for key in _META_FIELDS}
        index = TemporaryIndex(name=name, created_ms=created_ms, **told)
        if model_id in (None, index.model_id):
            found.append(index)
    return sorted(found, key=lambda index: (not index.is_check, index.started))


def _bulk_bodies(vectors: np.ndarray, documents: int) -> Iterator[str]:
    """Bodies of about 4 MB. Documents have numbers for ids: a request sent twice writes the same ones again."""
    lines: list[str] = []
    size = 0
    for number in range(max(len(vectors), documents)):
        source = {FIELD: _json_numbers(vectors[number])} if number < len(vectors) else {}
        lines += [json.dumps({"index": {"_id": str(number)}}), json.dumps(source)]
        size += len(lines[-1])
        if size > _BULK_BYTES:
            yield "\n".join(lines) + "\n"
            lines, size = [], 0
    if lines:
        yield "\n".join(lines) + "\n"


def _json_numbers(vector: np.ndarray) -> Sequence[float]:
    """The shortest decimal of a float32's double is read back as the same float32; binary vectors are signed bytes."""
    return (vector.view(np.int8) if vector.dtype == np.uint8 else vector).tolist()
