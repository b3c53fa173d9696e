# SPDX-License-Identifier: Apache-2.0
"""Where models are: `Place` is what files (`transforms.model_files`) and clusters have in common."""

from __future__ import annotations

import json
from typing import Any, Protocol

from pipelines import display
from transforms.errors import RequestError
from transforms.model import blob_digest
from transforms.opensearch import OpenSearchConnection, Session, model_index, temporary_index
from transforms.opensearch.publishing import unfinished
from transforms.opensearch.session import LAUNCHER_ATTEMPTS


class Place(Protocol):
    """Where models are."""

    def get(self, model_id: str) -> dict[str, Any]: ...

    def blob(self, model_id: str) -> bytes: ...

    def list(self) -> list[dict[str, Any]]: ...

    def delete(self, model_id: str) -> None: ...


class Cluster:
    """The models of a cluster, with the methods of `ModelFiles`."""

    def __init__(self, connection: OpenSearchConnection):
        self.url = connection.url
        self.session = Session(connection, LAUNCHER_ATTEMPTS)

    def get(self, model_id: str) -> dict[str, Any]:
        """The Get Model API's answer with the blob's size and hash in its place, and what the cluster state says."""
        found = model_index.get_model(self.session, model_id)
        if found is None:
            raise RequestError(f'Model "{model_id}" does not exist in {self.url}')
        blob = model_index.blob_of(found)
        del found["model_blob"]
        found |= blob_digest(blob)
        try:
            registration = model_index.registration(self.session, model_id)
            found["registration"] = None if registration is None else registration.text
        except model_index.NotPermitted:
            found["registration"] = "not shown: this user lacks cluster:monitor/state"
        return found | _unfinished_note(self._begun().get(model_id))

    def blob(self, model_id: str) -> bytes:
        return model_index.fetch(self.session, model_id).blob or b""

    def list(self) -> list[dict[str, Any]]:
        begun = self._begun()
        models = model_index.list_models(self.session)
        for model in models:
            model["model_definition"] = json.loads(model.get("model_definition") or '{"name": ""}')
            model |= _unfinished_note(begun.get(model["model_id"]))
        return models

    def _begun(self) -> dict[str, temporary_index.TemporaryIndex]:
        try:
            return unfinished(self.session)
        except model_index.NotPermitted:  # whoever may only read models is not shown what runs left
            return {}

    def used(self, warn: bool) -> dict[str, str]:
        """Model id to the indices and templates that name it.

        Raises NotPermitted if mappings cannot be read, or templates; with `warn`, templates may be left out.
        """
        used: dict[str, list[str]] = {}
        for index, fields in model_index.usage(self.session).items():
            for name, model_id in (field.split("=", 1) for field in fields):
                used.setdefault(model_id, []).append(f"index {index} (field {name})")
        try:
            for model_id, templates in model_index.template_usage(self.session).items():
                used.setdefault(model_id, []).extend(templates)
        except model_index.NotPermitted as error:
            if not warn:
                raise model_index.NotPermitted(f"nothing is deleted, templates may name any model: {error}") from None
            display.say(f"warning: templates are not looked at: {error}")
        return {model_id: ", ".join(users) for model_id, users in used.items()}

    def delete(self, model_id: str) -> None:
        if not model_index.delete_model(self.session, model_id):
            raise RequestError(f"Unable to delete model [{model_id}]. Model does not exist")


def _unfinished_note(index: temporary_index.TemporaryIndex | None) -> dict[str, str]:
    if index is None:
        return {}
    return {"unfinished": f"publication begun {index.started} ({index.name}); do not use, publish again or cleanup"}
