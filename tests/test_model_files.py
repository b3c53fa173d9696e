# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.io import filesystems
from apache_beam.io.filesystem import FileMetadata
from apache_beam.testing.util import assert_that, equal_to

from pipelines import models
from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, FAILED, TRAINING, TrainedModel, blob_digest, metadata, random_model_id
from transforms.model_files import ModelFiles, WriteToModelFiles, WrittenModel
from transforms.request import TrainingRequest

BODY = {
    "training_index": "i",
    "training_field": "f",
    "dimension": 8,
    "description": "words",
    "method": {
        "name": "ivf",
        "engine": "faiss",
        "parameters": {"nlist": 4, "encoder": {"name": "pq", "parameters": {"m": 2, "code_size": 8}}},
    },
}
REQUEST = TrainingRequest.from_fields(BODY)
BLOB = b"faiss" * 100


def model(model_id: str = "m1", blob: bytes | None = BLOB, error: str = "") -> TrainedModel:
    state = FAILED if blob is None else CREATED
    provenance = {"source": "s", "index_description": "IVF4,PQ2x8", **(blob_digest(blob) if blob else {})}
    return TrainedModel(model_id, metadata(REQUEST, state, error), blob, provenance)


def claim(files: ModelFiles, model_id: str = "m1", overwrite: bool = False) -> None:
    files.claim(model_id, {"model_id": model_id, **metadata(REQUEST, TRAINING)}, overwrite)


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return ModelFiles(str(tmp_path / "models"))


def test_model_json_has_the_get_model_api_s_fields(files: ModelFiles) -> None:
    claim(files)
    assert files.get("m1")["state"] == TRAINING
    files.write(model())
    found = files.get("m1")
    assert found.pop("timestamp").endswith("Z")
    assert found.pop("provenance")["blob_sha256"] == hashlib.sha256(BLOB).hexdigest()
    assert found == {
        "model_id": "m1",
        "state": "created",
        "description": "words",
        "error": "",
        "space_type": "l2",
        "dimension": 8,
        "engine": "faiss",
        "training_node_assignment": "",
        "model_definition": {
            "name": "ivf",
            "parameters": {"nlist": 4, "nprobes": 1, "encoder": {"name": "pq", "parameters": {"m": 2, "code_size": 8}}},
        },
        "data_type": "float",
        "compression_level": "16x",
        "model_version": "3.6.0",
    }
    assert files.blob("m1") == BLOB
    assert sorted(os.listdir(files.path("m1"))) == ["model.faiss", "model.json"]


def test_error_has_no_comma_and_an_end() -> None:
    failed = metadata(REQUEST, FAILED, "a, b, " + "x" * 2000)
    assert "," not in failed["error"]
    assert len(failed["error"]) == 1000


def test_an_id_is_taken_once(files: ModelFiles) -> None:
    claim(files)
    with pytest.raises(RequestError, match='Model with id="m1" already exists in '):
        claim(files)


def test_overwrite_leaves_the_old_model_until_the_new_one_is_complete(files: ModelFiles) -> None:
    claim(files)
    files.write(model())
    claim(files, overwrite=True)
    assert files.blob("m1") == BLOB
    files.write(model(blob=None, error="died"))
    assert files.get("m1")["state"] == CREATED
    files.write(model(blob=b"new"))
    assert files.blob("m1") == b"new"


def test_overwrite_of_a_failed_model(files: ModelFiles) -> None:
    claim(files)
    files.write(model(blob=None, error="died"))
    assert (files.get("m1")["state"], files.get("m1")["error"]) == (FAILED, "died")
    claim(files, overwrite=True)
    assert files.get("m1")["state"] == TRAINING


def test_what_the_launcher_said_of_a_failure_stays(files: ModelFiles) -> None:
    claim(files)
    files.describe("m1", model(blob=None, error="interrupted").json())
    files.write(model(blob=None, error="no such folder"))
    assert (files.get("m1")["state"], files.get("m1")["error"]) == (FAILED, "interrupted")


def test_writing_twice_changes_nothing(files: ModelFiles) -> None:
    claim(files)
    one = model()
    files.write(one)
    before = {name: Path(files.path("m1", name)).read_bytes() for name in os.listdir(files.path("m1"))}
    files.write(one)
    assert {name: Path(files.path("m1", name)).read_bytes() for name in os.listdir(files.path("m1"))} == before


def test_a_model_is_never_created_before_its_blob_is_there(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(files)

    def full(source: str, target: str) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            files.write(model())
    assert files.get("m1")["state"] == TRAINING
    assert os.listdir(files.path("m1")) == ["model.json"]


def test_blob_is_checked_against_its_hash(files: ModelFiles) -> None:
    claim(files)
    with pytest.raises(RequestError, match='"m1" is in state training, not created'):
        files.blob("m1")
    files.write(model())
    Path(files.path("m1", "model.faiss")).write_bytes(BLOB[:-1])
    with pytest.raises(TrainingError, match=r"does not have the SHA-256 that model.json states"):
        files.blob("m1")


def test_delete(files: ModelFiles) -> None:
    claim(files)
    with pytest.raises(RequestError, match=r"Cannot delete model \[m1\]. Model is still in training"):
        files.delete("m1")
    files.write(model())
    files.delete("m1")
    assert not os.path.exists(files.path("m1"))
    with pytest.raises(RequestError, match='Model "m1" does not exist'):
        files.delete("m1")


@pytest.mark.parametrize("bad", ["", "a/b", "..", ".", "a*", "a\nb", "a\\b", "é" * 257])
def test_ids_that_cannot_name_a_folder(files: ModelFiles, bad: str) -> None:
    with pytest.raises(RequestError, match="model_id"):
        claim(files, bad)
    assert not os.path.exists(files.model_dir)


@pytest.mark.parametrize("good", ["a,b c", "é" * 127, "-x", random_model_id()])
def test_ids_that_can(files: ModelFiles, good: str) -> None:
    claim(files, good)
    files.write(model(good))
    assert files.blob(good) == BLOB


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON"])
def test_what_is_no_model_is_not_listed(files: ModelFiles, text: str) -> None:
    claim(files)
    other = Path(files.path("other", "model.json"))
    other.parent.mkdir()
    other.write_text(text)
    assert [found["model_id"] for found in files.list()] == ["m1"]
    with pytest.raises(RequestError, match=r"other/model\.json does not describe a model$"):
        files.get("other")


def test_random_ids_look_like_opensearch_s() -> None:
    ids = {random_model_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(each) for each in ids} == {22}
    assert all(len(base64.urlsafe_b64decode(each + "==")) == 16 for each in ids)


def test_a_model_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cannot write to model_dir '.*file'"):
        claim(ModelFiles(str(tmp_path / "file")))


def test_transform(files: ModelFiles) -> None:
    claim(files)
    claim(files, "m2")
    with beam.Pipeline("FnApiRunner") as p:
        written = p | beam.Create([model(), model("m2", None, "why")]) | WriteToModelFiles(files.model_dir)
        assert_that(
            written,
            equal_to(
                [
                    WrittenModel("m1", files.path("m1"), CREATED, ""),
                    WrittenModel("m2", files.path("m2"), FAILED, "why"),
                ]
            ),
        )
    assert files.blob("m1") == BLOB
    assert [each["model_id"] for each in files.list()] == ["m1", "m2"]


def test_any_beam_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for object stores, which cannot be had here: Beam's local filesystem under a scheme of its own."""

    local = filesystems.FileSystems.get_filesystem("/")

    class Shelf(type(local)):  # type: ignore[misc]
        @classmethod
        def scheme(cls) -> str:
            return "shelf"

        @staticmethod
        def _local(path: str) -> str:
            return path.replace("shelf://", str(tmp_path) + "/")

        def join(self, basepath: str, *paths: str) -> str:
            return "/".join((basepath.rstrip("/"), *paths))

        def match(self, patterns: list, limits: list | None = None) -> list:
            found = local.match([self._local(each) for each in patterns], limits)
            for result in found:
                result.metadata_list = [
                    FileMetadata(entry.path.replace(f"{tmp_path}/", "shelf://"), entry.size_in_bytes)
                    for entry in result.metadata_list
                ]
            return found

        def create(self, path: str, *args: object, **options: object) -> object:
            Path(self._local(path)).parent.mkdir(parents=True, exist_ok=True)
            return super().create(self._local(path), *args, **options)

        def open(self, path: str, *args: object, **options: object) -> object:
            return super().open(self._local(path), *args, **options)

        def exists(self, path: str) -> bool:
            return os.path.isfile(self._local(path))  # a prefix is not an object

        def delete(self, paths: list) -> None:
            for each in paths:
                os.unlink(self._local(each))

    files = ModelFiles("shelf://models")
    claim(files)
    with pytest.raises(RequestError, match="already exists"):
        claim(files)
    files.write(model())
    assert files.blob("m1") == BLOB
    assert (tmp_path / "models" / "m1" / "model.faiss").read_bytes() == BLOB
    assert [each["model_id"] for each in files.list()] == ["m1"]
    files.delete("m1")
    assert files.list() == []


# --- knn-models ---


def test_models_command(files: ModelFiles, capsys: pytest.CaptureFixture[str]) -> None:
    claim(files)
    files.write(model())
    claim(files, "m2")
    models.run(["get", "m1", "--model_dir", files.model_dir])
    assert json.loads(capsys.readouterr().out) == files.get("m1")
    models.run(["list", "--model_dir", files.model_dir])
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == [CREATED, TRAINING]
    models.run(["delete", "m1", "--model_dir", files.model_dir])
    assert json.loads(capsys.readouterr().out) == {"model_id": "m1", "result": "deleted"}
    assert [each["model_id"] for each in files.list()] == ["m2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["get", "m1"], "model_dir"),
        (["get", "m1", "--model_dir", "{dir}"], 'Model "m1" does not exist in'),
        (["lst", "--model_dir", "{dir}"], "invalid choice: 'lst'"),
    ],
)
def test_models_command_exits_with_2(
    files: ModelFiles,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["knn-models", *(word.format(dir=files.model_dir) for word in words)])
    with pytest.raises(SystemExit) as caught:
        models.main()
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
