# SPDX-License-Identifier: Apache-2.0
"""`knn-train` with bars, with a model to compare with, and with --suggest."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import suggest, train
from pipelines.options import parse
from pipelines.plan import make_plans
from tests.opensearch_server import OpenSearchServer
from tests.test_train import REQUEST, VECTORS, D, arguments, write_export
from transforms.errors import RequestError, TrainingError
from transforms.model_files import ModelFiles
from transforms.sampling import keep_fraction

DRIFTED = VECTORS + np.float32(2) * np.random.default_rng(3).standard_normal((len(VECTORS), D)).astype(np.float32)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    (tmp_path / "temp").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, export: str) -> Path:
    """Where there is a model `old`, trained with bars that it reaches."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "request.json").write_text(json.dumps(REQUEST))
    (folder / "temp").mkdir()
    bars = ["--min_recall", "0.01@10/nprobes=8", "--max_imbalance", "5"]
    train.run(arguments(folder, export, "--model_id", "old", *bars))
    return folder


@pytest.fixture
def old(work: Path, trained: Path) -> dict[str, Any]:
    """The model `old`, among those of `work`."""
    shutil.copytree(trained / "models", work / "models")
    return files(work).get("old")


def files(work: Path) -> ModelFiles:
    return ModelFiles(str(work / "models"))


def in_folder(work: Path, model_id: str) -> set[str]:
    return set(os.listdir(work / "models" / model_id))


def test_a_model_says_how_good_it_is(work: Path, export: str, old: dict[str, Any]) -> None:
    quality = old["quality"]
    assert old["state"] == "created"
    assert quality["vectors"]["trained"] == 4_096
    assert quality["vectors"]["queries_held_out"] is True
    assert quality["vectors"]["base"] + quality["vectors"]["queries"] == len(VECTORS)  # there are no more
    assert len(quality["history"]) == 10
    assert in_folder(work, "old") == {"model.faiss", "model.json", "report.html"}
    assert "<h1>old</h1>" in (work / "models" / "old" / "report.html").read_text()
    # Held-out vectors come after those to train on: the model is the same with and without them.
    (without,) = train.run(arguments(work, export, "--model_id", "m2", "--eval_vectors", "0"))
    assert without["provenance"]["blob_sha256"] == old["provenance"]["blob_sha256"]
    assert "quality" not in without
    assert in_folder(work, "m2") == {"model.faiss", "model.json"}


def test_where_all_vectors_are_trained_on(work: Path, export: str) -> None:
    (model,) = train.run(arguments(work, export, "--use_all_vectors"))
    assert model["quality"]["vectors"]["queries_held_out"] is False
    assert model["quality"]["vectors"]["base"] == model["provenance"]["vectors_sampled"] == len(VECTORS)


def test_a_model_below_its_bars_fails_and_leaves_its_report(
    work: Path, export: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bars = ["--min_recall", "0.99@100/nprobes=8", "--max_imbalance", "1.0001"]
    monkeypatch.setattr("sys.argv", ["knn-train", *arguments(work, export, "--model_id", "m1", *bars)])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    model = files(work).get("m1")
    assert model["state"] == "failed"
    message = (
        r"min_recall is 0\.99@100 but recall@100 is 0\.\d{3} with nprobes 8; "
        r"max_imbalance is 1\.0001 but the lists have 1\.\d\d \(0 of them are empty\)"
    )
    assert re.fullmatch(message, model["error"])
    assert printed.splitlines()[-1] == f"failed: {model['error']}"
    assert in_folder(work, "m1") == {"model.json", "report.html"}
    assert "max_imbalance is 1.0001 but" in (work / "models" / "m1" / "report.html").read_text()


def test_too_few_lists_are_caught(work: Path, export: str) -> None:
    """With nlist 4 a list holds a dozen clusters, whose vectors the codes cannot tell apart; with 64 they can."""

    def method(nlist: int) -> list[str]:
        parameters = {**REQUEST["method"]["parameters"], "nlist": nlist, "nprobes": nlist}
        return ["--method", json.dumps({**REQUEST["method"], "parameters": parameters}), "--min_recall", "0.2@10"]

    train.run(arguments(work, export, "--model_id", "many", *method(64)))
    with pytest.raises(TrainingError, match=r"min_recall is 0\.2@10 but recall@10 is 0\.0\d+ with nprobes 4"):
        train.run(arguments(work, export, "--model_id", "few", *method(4)))
    assert "is lost in the codes, however many lists are searched" in (
        (work / "models" / "few" / "report.html").read_text()
    )


def test_a_model_below_the_bar_does_not_replace_a_good_one(work: Path, export: str, old: dict[str, Any]) -> None:
    report = (work / "models" / "old" / "report.html").read_text()
    with pytest.raises(TrainingError, match="min_recall"):
        train.run(arguments(work, export, "--model_id", "old", "--overwrite", "--min_recall", "0.99@10", "--seed", "2"))
    assert files(work).get("old") == old
    assert files(work).blob("old")
    assert (work / "models" / "old" / "report.html").read_text() == report


def test_a_model_that_was_not_measured_has_no_report_of_the_one_it_replaces(
    work: Path, export: str, old: dict[str, Any]
) -> None:
    assert "report.html" in in_folder(work, "old")
    train.run(arguments(work, export, "--model_id", "old", "--overwrite", "--eval_vectors", "0"))
    assert in_folder(work, "old") == {"model.faiss", "model.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_vectors", "-1"], "eval_vectors is -1, but must be 0 or more"),
        (["--min_recall", "ninety"], "min_recall is 'ninety', expected a share and a k, as 0.85@10"),
        (["--min_recall", "0.9@10/nprobes=9"], "min_recall has nprobes 9, expected 1 to nlist, 8"),
        (["--min_recall", "0.9@10", "--eval_vectors", "0"], "eval_vectors is 0, but --min_recall"),
        (["--max_imbalance", "0.2"], "max_imbalance is 0.2, but lists of one size have 1"),
        (["--max_imbalance", "nan"], "max_imbalance is nan, but lists of one size have 1"),
        (["--suggest", "--max_bytes_per_vector", "nan"], "max_bytes_per_vector is nan, but must be above 0"),
        (["--only_if_better", "2%"], "--only_if_better needs --compare_to MODEL_ID"),
        (["--compare_to", "none"], 'compare_to: Model "none" does not exist in'),
        (["--suggest"], "--suggest needs --min_recall or --max_bytes_per_vector"),
        (["--suggest", "--max_bytes_per_vector", "0"], "max_bytes_per_vector is 0, but must be above 0"),
        (["--suggest", "--min_recall", "0.9@10", "--publish", "auto"], "--suggest writes no model"),
        (["--suggest", "--min_recall", "0.9@10", "--max_imbalance", "2"], "--suggest chooses by recall and bytes"),
        (["--suggest", "--min_recall", "0.9@10/nprobes=4"], "min_recall is '0.9@10/nprobes=4', but --suggest finds"),
    ],
)
def test_bad_flags_are_refused_before_any_work(work: Path, export: str, words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match="^" + re.escape(message)):
        train.run(arguments(work, export, *words))
    assert not (work / "models").exists()


def test_dry_run_says_what_will_be_measured(work: Path, export: str, capsys: pytest.CaptureFixture[str]) -> None:
    bars = ["--min_recall", "0.9@10/nprobes=4", "--max_imbalance", "2"]
    assert train.run(arguments(work, export, "--dry_run", *bars)) == []
    printed = capsys.readouterr().out
    assert "7,904 vectors held out; recall@10 at least 0.9 with nprobes 4; imbalance at most 2" in printed
    assert train.run(arguments(work, export, "--dry_run", "--use_all_vectors")) == []
    assert "on vectors that were trained on: there are no others" in capsys.readouterr().out


def test_metrics(work: Path, export: str) -> None:
    options, _ = parse(arguments(work, export, "--model_id", "m1"))
    (work / "models" / "m1").mkdir(parents=True)
    pipeline = beam.Pipeline(runner="FnApiRunner")
    train.build(pipeline, make_plans(options), options, str(work / "temp"))
    result = pipeline.run()
    result.wait_until_finish()
    found = {each.key.metric.name: each.committed for each in result.metrics().query()["distributions"]}
    quality = files(work).get("m1")["quality"]
    assert found["recall_at_10_permille"].max == int(1000 * quality["at"]["expected"]["10"])
    assert found["imbalance_permille"].max == int(1000 * quality["lists"]["imbalance_factor"])
    assert found["evaluate_msec"].count == 1


# --- against the model before ---


def test_the_same_vectors_again_cost_only_the_sample(
    work: Path, export: str, old: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["--model_id", "new", "--seed", "5", "--compare_to", "old", "--only_if_better", "5%"]
    assert train.run(arguments(work, export, *again)) == []
    printed = capsys.readouterr()
    first, last = (json.loads(line) for line in printed.out.splitlines())
    assert first == {"model_id": "new"}
    assert (last["model_id"], last["state"], last["path"]) == ("old", "created", f"{work}/models/old")
    assert (last["error"], last["published"]) == ("", False)
    assert "nothing was trained" in last["kept"]
    assert 'model "old" is kept: its error is' in printed.err
    assert "nothing was trained" in printed.err
    assert "k-means" not in printed.err
    assert os.listdir(work / "models") == ["old"]
    assert files(work).get("old") == old
    assert os.listdir(work / "temp") == []


def test_vectors_that_have_changed_get_a_new_model(
    work: Path, old: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = write_export(work / "changed", vectors=DRIFTED)
    again = ["--model_id", "new", "--compare_to", "old", "--only_if_better", "5%"]
    (new,) = train.run(arguments(work, changed, *again))
    compared = new["quality"]["previous"]
    assert compared["model_id"] == "old"
    assert compared["error_of_new"] < 0.95 * compared["error"]
    assert compared["error_of_new"] == pytest.approx(new["quality"]["error"]["held_out"]["total"], rel=0.02)
    assert compared["error_then"] == old["quality"]["error"]["held_out"]["total"] < compared["error"]
    assert compared["nprobes"] == old["quality"]["at"]["nprobes"]
    assert compared["expected"]["10"] < new["quality"]["at"]["expected"]["10"]
    printed = capsys.readouterr().out
    assert f"{compared['error_of_new']:.5g}, that of old {compared['error']:.5g}" in printed
    assert re.search(rf"^recall of old +{compared['expected']['10']:.3f} @10, ", printed, re.MULTILINE)
    assert f"old has {compared['error']:.5g} and {compared['expected']['10']:.2f} (nprobes 1)" in (
        (work / "models" / "new" / "report.html").read_text()
    )


def test_drift_along_the_source_is_in_the_report(work: Path) -> None:
    """The last fifth of the source has other vectors, fewer than its centroids would need."""
    last = int(0.8 * len(VECTORS))
    changed = write_export(work / "changed", vectors=np.concatenate([VECTORS[:last], DRIFTED[last:]]))
    (model,) = train.run(arguments(work, changed))
    drift = model["quality"]["drift"]
    assert max(drift["error"][:15]) < 1 < 1.2 < min(drift["error"][-3:])
    assert drift["position"] == pytest.approx(np.linspace(0.025, 0.975, 20), abs=0.02)
    page = (work / "models" / model["model_id"] / "report.html").read_text()
    assert "The last vectors of the source have" in page
    assert "Drift along the source" in page


def test_a_new_model_that_is_no_better_is_not_kept(work: Path, export: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With another nlist the error of its time says nothing, so the new one is trained first."""
    train.run(arguments(work, export, "--model_id", "old"))
    parameters = {**REQUEST["method"]["parameters"], "nlist": 7}
    fields = ["--method", json.dumps({**REQUEST["method"], "parameters": parameters})]
    assert train.run(arguments(work, export, *fields, "--compare_to", "old", "--only_if_better", "50%")) == []
    assert "that of a new model" in capsys.readouterr().err
    assert os.listdir(work / "models") == ["old"]


def test_too_few_vectors_to_compare_with_keep_no_old_model(work: Path, old: dict[str, Any]) -> None:
    """What the file does not say: nearly all of its rows are null."""
    lists: list[Any] = [None] * 5_000
    lists[::10] = VECTORS[:500].tolist()
    table = pa.table({"v": pa.array(lists, pa.list_(pa.float32()))})
    pq.write_table(table, work / "few.parquet", write_statistics=False)
    compared = ["--compare_to", "old", "--only_if_better", "2%", "--max_training_vector_count", "1000"]
    with pytest.raises(TrainingError, match=r"compare_to needs 100 vectors .* but 0 of 500 are left"):
        train.run(arguments(work, str(work / "few.parquet"), *compared))


def test_what_cannot_be_compared(work: Path, export: str, old: dict[str, Any]) -> None:
    flat = {**REQUEST["method"], "parameters": {"nlist": 8}}
    with pytest.raises(RequestError, match='compare_to: model "old" has encoder pq, this request flat'):
        train.run(arguments(work, export, "--compare_to", "old", "--method", json.dumps(flat)))
    with pytest.raises(RequestError, match=r"compare_to needs 100 vectors or more .* but 0 of 12000 are left"):
        train.run(arguments(work, export, "--compare_to", "old", "--use_all_vectors"))
    assert os.listdir(work / "models") == ["old"]


def test_the_graph_holds_no_model(work: Path, export: str, old: dict[str, Any]) -> None:
    """The old model is handed over as a file."""
    options, _ = parse(arguments(work, export, "--compare_to", "old"))
    pipeline = beam.Pipeline(runner="FnApiRunner")
    train.build(pipeline, make_plans(options), options, str(work / "temp"))
    graph = pipeline.to_runner_api().SerializeToString()
    blob = files(work).blob("old")
    assert blob[200:264] not in graph
    (handed_over,) = (work / "temp").glob("*.previous.json")
    assert handed_over.read_bytes() == blob


def test_a_model_of_the_cluster_to_compare_with(work: Path, export: str, opensearch_3: OpenSearchServer) -> None:
    method = json.dumps({**REQUEST["method"], "parameters": {"nlist": 8}})
    publish = ["--opensearch_url", opensearch_3.url, "--publish", "auto", "--method", method]
    train.run(arguments(work, export, "--model_id", "quality-old", *publish))
    files(work).remove("quality-old")
    again = ["--model_id", "quality-new", "--seed", "9", "--compare_to", "quality-old", "--only_if_better", "40%"]
    assert train.run(arguments(work, export, *again, *publish)) == []
    client = opensearch_3.client()
    found = client.transport.perform_request("GET", "/_plugins/_knn/models/quality-old")
    assert found["state"] == "created"
    assert not client.exists(index=".opensearch-knn-models", id="quality-new")
    client.transport.perform_request("DELETE", "/_plugins/_knn/models/quality-old")


# --- a suggestion ---


def test_suggest_prints_a_request_that_trains_as_well_as_it_says(
    work: Path, export: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (body,) = train.run([*arguments(work, export)[:4], "--suggest", "--min_recall", "0.8@10"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == body
    assert re.search(r"^IVF256,PQ8x8 +8x +35\.2 ", printed.err, re.MULTILINE)
    assert not (work / "models").exists()
    (work / "request.json").write_text(printed.out)
    (model,) = train.run(arguments(work, export))
    assert model["quality"]["at"]["expected"]["10"] >= 0.8


def test_what_is_read_suffices_for_all_that_is_suggested(work: Path, export: str) -> None:
    """The request itself has so few lists that it needs less than half of the vectors."""
    words = ["--suggest", "--min_recall", "0.8@10", "--eval_vectors", "300"]
    options, _ = parse(arguments(work, export, *words))
    (plan,) = make_plans(options)
    tried = suggest.plans(plan, options)
    largest = max(each.rows_wanted for each in tried)
    assert plan.keep < 0.5 < largest / plan.summary.count
    assert {each.keep for each in tried} == {keep_fraction(largest, plan.summary.count)}


def test_a_pattern_means_the_newest_model_of_a_schedule(work: Path, export: str, capsys: Any) -> None:
    def run(model_id: str, *more: str) -> dict[str, Any]:
        compared = ["--compare_to", "s-*", "--only_if_better", "2%"]
        train.run(arguments(work, export, "--model_id", model_id, *compared, *more))
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    assert run("s-1")["model_id"] == "s-1"  # there is nothing to compare with yet
    train.run(arguments(work, export, "--model_id", "other", "--eval_vectors", "0"))
    kept = run("s-2")
    assert kept["model_id"] == "s-1"
    assert "nothing was trained" in kept["kept"]
    better = {**REQUEST["method"], "parameters": {**REQUEST["method"]["parameters"], "nlist": 32}}
    assert run("s-3", "--method", json.dumps(better))["model_id"] == "s-3"
    assert run("s-4", "--method", json.dumps(better))["model_id"] == "s-3"
