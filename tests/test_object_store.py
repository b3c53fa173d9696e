# SPDX-License-Identifier: Apache-2.0
"""Vectors, models and temporary files in an object store, which Beam must be told how to reach."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_store import BUCKET, ObjectStore, moto_server, object_store
from tests.runners import required
from tests.runners.job import REQUEST, knn_train

S3 = f"s3://{BUCKET}"


@pytest.fixture
def store(tmp_path: Path, export: str) -> Iterator[ObjectStore]:
    required(moto_server)
    with object_store(tmp_path / "store.log") as store:
        store.put("export", export)
        yield store


def run(program: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command with nothing of AWS in its environment but `env`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", f"pipelines.{program}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**clean, **(env or {})})


def train(
    tmp_path: Path, *words: str, model_id: str = "model", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    given = ["--request", f"{tmp_path}/request.json", "--parquet", f"{S3}/export/*.parquet", "--seed", "5"]
    where = ["--model_dir", f"{S3}/models", "--temp_location", f"{S3}/temp"]
    return run("train", *given, *where, "--model_id", model_id, *words, env=env)


def test_everything_in_the_store(store: ObjectStore, export: str, tmp_path: Path) -> None:
    expected = knn_train(tmp_path / "local", "--parquet", export).checked()
    ran = train(tmp_path, *store.flags)
    assert ran.returncode == 0, ran.stderr
    assert sorted(store.list("models")) == [f"models/model/model.{kind}" for kind in ("faiss", "json")] + [
        "models/model/report.html"
    ]
    assert len(store.read("models/model/model.faiss")) == expected.blob_bytes
    description = json.loads(store.read("models/model/model.json"))
    assert description["provenance"]["blob_sha256"] == expected.blob_sha256
    assert store.list("temp") == []
    told = [ran.stdout, ran.stderr, json.dumps(description), store.read("models/model/report.html").decode()]
    assert not [text for text in told if store.secret_key in text]


def test_what_amazon_s_variables_say_will_do(store: ObjectStore, tmp_path: Path) -> None:
    env = store.environment
    ran = train(tmp_path, "--eval_vectors", "0", env=env)
    assert ran.returncode == 0, ran.stderr
    listed = run("models", "list", "--model_dir", f"{S3}/models", env=env)
    assert [model["model_id"] for model in json.loads(listed.stdout)] == ["model"], listed.stderr
    again = train(tmp_path, "--compare_to", "model", model_id="new", env=env)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["state"] == "created"
    assert run("models", "delete", "model", "--model_dir", f"{S3}/models", env=env).returncode == 0
    assert not store.list("models/model/")


def test_resuming_from_a_sample_in_the_store(store: ObjectStore, tmp_path: Path) -> None:
    failed = train(tmp_path, *store.flags, "--min_recall", "0.999@10")
    assert failed.returncode == 1
    assert "the sample is kept in s3://" in failed.stderr
    kept = store.list("temp")
    assert kept
    resumed = train(tmp_path, *store.flags, "--overwrite", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming with what s3://" in resumed.stderr
    assert store.list("temp") == []


def test_the_sample_of_a_run_that_may_be_alive_is_left_alone(store: ObjectStore, tmp_path: Path) -> None:
    failed = train(tmp_path, *store.flags, "--min_recall", "0.999@10")
    assert failed.returncode == 1
    kept = store.list("temp")
    (mark,) = [name for name in kept if name.endswith("/kept")]
    store.delete(mark)  # as it is while a run trains
    assert train(tmp_path, *store.flags, model_id="other", env={}).returncode == 0
    assert sorted([*store.list("temp"), mark]) == sorted(kept)
    store.write(mark)
    assert train(tmp_path, *store.flags, model_id="another").returncode == 0
    assert store.list("temp") == []


def test_a_store_that_refuses_is_not_an_empty_one(store: ObjectStore) -> None:
    store.refuse()
    env = store.environment
    where = ["--model_dir", f"{S3}/models"]
    for words in (["list", *where], ["prune", "a-*", "--keep", "1", *where], ["get", "model", *where]):
        ran = run("models", *words, env=env)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert re.match(r"failed: cannot (list|read) s3://vectors/models/\S+: .+", ran.stderr.splitlines()[-1])
        assert "Traceback" not in ran.stderr


def test_without_credentials_nothing_is_waited_for(tmp_path: Path) -> None:
    ran = train(tmp_path, env={"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/none"})
    assert ran.returncode == 2
    assert ran.stderr == f"error: cannot use {S3}/models: there are no credentials for S3, as in AWS_ACCESS_KEY_ID\n"


def test_a_bucket_that_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    ran = train(tmp_path, *store.flags, "--parquet", "s3://elsewhere/*.parquet")
    assert ran.returncode == 2
    assert ran.stderr == "error: no Parquet file matches 's3://elsewhere/*.parquet'\n"
    assert store.list("models") == []
