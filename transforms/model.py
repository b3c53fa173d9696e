# SPDX-License-Identifier: Apache-2.0
"""`TrainedModel`: a model's bytes and its metadata, in the words of the plugin's Get Model API."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from transforms.request import TrainingRequest

TRAINING, CREATED, FAILED = "training", "created", "failed"


def random_model_id() -> str:
    """22 URL-safe base64 characters, like the ids that OpenSearch makes (`UUIDs.randomBase64UUID`)."""
    return base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")


def now() -> str:
    """The time in UTC as the plugin writes it, e.g. 2026-11-24T10:11:12.123456Z."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True)
class TrainedModel:
    """The outcome of a training: `created` with a blob, or `failed` with an error.

    Attributes:
      model_id: at most 512 bytes.
      metadata: the fields of the Get Model API but `model_id` and `model_blob`; see `metadata`.
      blob: the serialised faiss index, None unless the state is `created`.
      provenance: where the model comes from: source, counts, seed, versions, timings.
      quality: how good it is, from `quality.evaluate`; None if nobody measured it.
    """

    model_id: str
    metadata: Mapping[str, Any]
    blob: bytes | None = field(default=None, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    quality: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def state(self) -> str:
        return self.metadata["state"]

    @property
    def error(self) -> str:
        return self.metadata["error"]

    def json(self) -> dict[str, Any]:
        """What `model.json` holds."""
        quality = {} if self.quality is None else {"quality": dict(self.quality)}
        return {"model_id": self.model_id, **self.metadata, "provenance": dict(self.provenance), **quality}


def metadata(request: TrainingRequest, state: str, error: str = "") -> dict[str, Any]:
    """The Get Model API's fields for a model of `request`.

    `mode` and `compression_level` are there only where the plugin would store them. Commas are taken out of `error`:
    one would make the plugin's comma-separated registration string unreadable.
    """
    fields: dict[str, Any] = {
        "state": state,
        "timestamp": now(),
        "description": request.description,
        "error": error.replace(",", ";")[:1000],
        "space_type": request.space_type,
        "dimension": request.dimension,
        "engine": request.engine,
        "training_node_assignment": "",
        "model_definition": request.model_definition,
        "data_type": request.data_type,
    }
    if request.mode is not None:
        fields["mode"] = request.mode
    if request.compression_level is not None:
        fields["compression_level"] = request.compression_level
    fields["model_version"] = request.target_version
    return fields


def sha256(blob: bytes) -> str:
    """The hexadecimal digest that says which blob is meant."""
    return hashlib.sha256(blob).hexdigest()


def blob_digest(blob: bytes) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a blob, as provenance states them."""
    return {"blob_bytes": len(blob), "blob_sha256": sha256(blob)}
