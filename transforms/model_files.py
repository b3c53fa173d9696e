# SPDX-License-Identifier: Apache-2.0
"""Models as files: `<model_dir>/<model_id>/model.faiss` is the raw blob, `model.json` what the Get Model API would
say, with provenance and quality, and `report.html` the same for a person to look at.

`model.json` says `training`, then `created` or `failed`. It is written last and whole, so whoever reads `created`
finds a complete blob.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics

from transforms import files, report
from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, FAILED, TRAINING, TrainedModel, sha256
from transforms.reading import METRICS
from transforms.request_body import MAX_MODEL_ID_BYTES

BLOB, DESCRIPTION, REPORT, REJECTED = "model.faiss", "model.json", "report.html", "rejected.jsonl"


@dataclass(frozen=True)
class ModelFiles:
    """The models in one folder on any Beam filesystem."""

    model_dir: str

    def path(self, model_id: str, name: str = "") -> str:
        return files.join(self.model_dir, check_model_id(model_id), *([name] if name else []))

    def claim(self, model_id: str, description: dict[str, Any], overwrite: bool = False) -> bool:
        """Makes the model exist, in the state that `description` gives.

        With `overwrite`, a created model that is there already stays as it is until `write` replaces it by a complete
        one: the result is False then.

        Raises:
          RequestError: the id is taken and `overwrite` is false, or the folder cannot be written.
        """
        folder = self.path(model_id)
        try:
            if overwrite and self.state(model_id) == CREATED:
                return False
            if overwrite:
                self.remove(model_id)
            if files.is_local(folder):
                os.makedirs(folder)  # exclusive: of two runs with one id, one fails here
            elif files.match(self.path(model_id, DESCRIPTION)):
                raise FileExistsError
            self.describe(model_id, description)
            return True
        except FileExistsError:
            raise RequestError(f'Model with id="{model_id}" already exists in {self.model_dir}') from None
        except OSError as error:
            raise RequestError(f"cannot write to model_dir {self.model_dir!r}: {error}") from error

    def describe(self, model_id: str, description: dict[str, Any]) -> None:
        """Replaces `model.json` in one step."""
        files.write_whole(self.path(model_id, DESCRIPTION), (json.dumps(description, indent=2) + "\n").encode())

    def write(self, model: TrainedModel) -> None:
        """Writes the blob, if there is one, and then says so. Doing it again changes nothing.

        A failure replaces neither a model that was created before nor what the launcher says of a run that it gave up.
        """
        before = self.state(model.model_id)
        if model.blob is None and before in (CREATED, FAILED):
            return
        if model.blob is not None:
            if before == CREATED:  # no reader may take the new blob for the one that the old description is about
                self.describe(model.model_id, {**self.get(model.model_id), "state": TRAINING})
            files.write_whole(self.path(model.model_id, BLOB), model.blob)
        page = self.path(model.model_id, REPORT)
        if model.quality is not None and "at" in model.quality:
            files.write_whole(page, report.html(model.json()).encode())
        else:
            files.remove(page)  # that of the model that this one replaces
        self.describe(model.model_id, model.json())

    def get(self, model_id: str) -> dict[str, Any]:
        """The content of `model.json`. Raises RequestError if there is no such model."""
        try:
            found = json.loads(files.read_whole(self.path(model_id, DESCRIPTION)))
        except FileNotFoundError:
            raise RequestError(f'Model "{model_id}" does not exist in {self.model_dir}') from None
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"model_id", "state"} <= set(found):
            raise RequestError(f"{self.path(model_id, DESCRIPTION)} does not describe a model")
        return found

    def blob(self, model_id: str) -> bytes:
        """The blob of a `created` model, checked against its SHA-256. Raises RequestError or TrainingError."""
        description = self.get(model_id)
        if description["state"] != CREATED:
            raise RequestError(f'Model "{model_id}" is in state {description["state"]}, not created')
        try:
            blob = files.read_whole(self.path(model_id, BLOB))
        except FileNotFoundError:
            raise TrainingError(f"{self.path(model_id, BLOB)} is missing, though the model is created") from None
        wanted = description.get("provenance", {}).get("blob_sha256")
        if wanted not in (None, sha256(blob)):
            raise TrainingError(
                f"{self.path(model_id, BLOB)} does not have the SHA-256 that {DESCRIPTION} states: {wanted}"
            )
        return blob

    def fetch(self, model_id: str) -> TrainedModel:
        """A `created` model with its blob; raises as `blob`."""
        described = self.get(model_id)
        other = ("model_id", "provenance", "quality")
        metadata = {name: value for name, value in described.items() if name not in other}
        provenance, quality = described.get("provenance", {}), described.get("quality")
        return TrainedModel(model_id, metadata, self.blob(model_id), provenance, quality)

    def list(self) -> list[dict[str, Any]]:
        """The descriptions of all models, by id."""
        models = []
        for path in files.match(files.join(self.model_dir, "*", DESCRIPTION)):
            with suppress(RequestError):  # not ours, or removed meanwhile
                models.append(self.get(posixpath.basename(posixpath.dirname(path))))
        return sorted(models, key=lambda model: model["model_id"])

    def delete(self, model_id: str) -> None:
        """Removes a model; raises RequestError if there is none or if it is still in training."""
        if self.get(model_id)["state"] == TRAINING:
            raise RequestError(f"Cannot delete model [{model_id}]. Model is still in training")
        self.remove(model_id)

    def remove(self, model_id: str) -> None:
        """Removes the model's files, in whatever state it is."""
        files.remove_folder(self.path(model_id))

    def withdraw(self, model_id: str) -> None:
        """Leaves nothing of a model that was claimed and is not wanted, but what `claim` left in its place."""
        if self.state(model_id) != CREATED:
            self.remove(model_id)

    def state(self, model_id: str) -> str | None:
        """The state of a model, None if there is none."""
        try:
            return self.get(model_id)["state"]
        except RequestError:
            return None


@dataclass(frozen=True)
class WrittenModel:
    """Result of a write: where the model is, how it ended, and why an older model is to be kept instead, if so."""

    model_id: str
    path: str
    state: str
    error: str
    kept: str = ""


@dataclass
class WriteToModelFiles(beam.PTransform):
    """PCollection[TrainedModel] -> PCollection[WrittenModel].

    The ids must have been claimed (`ModelFiles.claim`) by whoever starts the pipeline, so that a retried bundle,
    which writes the same files again, is told apart from a second run with the same id.
    """

    model_dir: str

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, models: beam.PCollection[TrainedModel]) -> beam.PCollection[WrittenModel]:
        return models | "Write model files" >> beam.ParDo(_WriteFn(self.model_dir)).with_output_types(WrittenModel)

    def display_data(self) -> dict[str, Any]:
        return {"model_dir": self.model_dir}


class _WriteFn(beam.DoFn):
    def __init__(self, model_dir: str):
        self._files = ModelFiles(model_dir)
        self._written = Metrics.counter(METRICS, "models_written")

    def process(self, model: TrainedModel) -> Iterator[WrittenModel]:
        kept = model.provenance.get("kept", "")
        if kept:
            self._files.withdraw(model.model_id)
        else:
            self._files.write(model)
            self._written.inc()
        yield WrittenModel(model.model_id, self._files.path(model.model_id), model.state, model.error, kept)


def check_model_id(model_id: str) -> str:
    """`model_id` if it can name a document and a folder; RequestError otherwise."""
    if not model_id or len(model_id.encode()) > MAX_MODEL_ID_BYTES:
        raise RequestError(
            f"model_id {model_id!r} has {len(model_id.encode())} bytes, expected 1 to {MAX_MODEL_ID_BYTES}"
        )
    if model_id in (".", "..") or any(c in model_id for c in "/\\*?[") or not model_id.isprintable():
        raise RequestError(
            f"model_id {model_id!r} cannot name a folder: it is . or .. or has one of / \\ * ? [ or a control character"
        )
    return model_id


def write_rejected(path: str, rows: Iterable[dict[str, str]]) -> None:
    """Bad vectors, one JSON object a line."""
    files.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
