# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import models, train
from pipelines.options import TrainOptions, body, parse
from pipelines.plan import make_plans
from tests.opensearch_server import OpenSearchServer
from transforms import run_folder
from transforms.errors import RequestError, TrainingError
from transforms.model_files import ModelFiles
from transforms.opensearch import OpenSearchConnection, Session, model_index, temporary_index
from transforms.trainer_process import train_in_process

D, ROWS = 16, 12_000
RNG = np.random.default_rng(11)
CENTRES = RNG.standard_normal((50, D))
VECTORS = (CENTRES[RNG.integers(0, 50, ROWS)] + 0.2 * RNG.standard_normal((ROWS, D))).astype(np.float32)
REQUEST: dict[str, Any] = {
    "training_index": "vectors",
    "training_field": "v",
    "dimension": D,
    "method": {
        "name": "ivf",
        "engine": "faiss",
        "space_type": "l2",
        "parameters": {"nlist": 8, "encoder": {"name": "pq", "parameters": {"m": 4, "code_size": 4}}},
    },
}
SAMPLE = 256 * 16


def write_export(folder: Path, files: int = 3, row_group_size: int = 1_000, vectors: np.ndarray = VECTORS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(vectors, files)):
        table = pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), D)})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=row_group_size)
    return f"{folder}/*.parquet"


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    (tmp_path / "temp").mkdir()
    return tmp_path


def arguments(work: Path, export: str, *more: str) -> list[str]:
    where = ["--parquet", export, "--model_dir", str(work / "models"), "--temp_location", str(work / "temp")]
    return ["--request", str(work / "request.json"), *where, *more]


def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def trained(words: list[str]) -> Mapping[str, Any]:
    """The one model of a run."""
    (model,) = train.run(words)
    return model


# --- a good run ---


def test_trains_a_model_that_faiss_trains_from_the_same_rows(
    work: Path, export: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import faiss

    from transforms.parquet import ParquetVectors

    model = trained(arguments(work, export, "--model_id", "m1", "--seed", "7"))
    source = ParquetVectors(export, "v", D, seed=7)
    blocks = [block for part in source.slices() for block in source.read(part, 1.0, print)]
    order = np.argsort(np.concatenate([block.priorities for block in blocks]))[:SAMPLE]
    rows = np.concatenate([block.vectors for block in blocks])[order]
    index = faiss.index_factory(D, "IVF8,PQ4x4np")
    index.make_direct_map()
    index.train(rows)
    blob = faiss.serialize_index(index).tobytes()
    assert ModelFiles(str(work / "models")).blob("m1") == blob
    assert (model["state"], model["provenance"]["vectors_sampled"]) == ("created", SAMPLE)
    assert model["provenance"]["vectors_in_source"] == ROWS
    assert model["provenance"]["blob_sha256"] == hashlib.sha256(blob).hexdigest()
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[0]) == {"model_id": "m1"}
    path = str(work / "models" / "m1")
    told = {"model_id": "m1", "state": "created", "error": "", "kept": "", "path": path}
    assert json.loads(printed.out.splitlines()[-1]) == {**told, "published": False, "route": None, "exact": None}
    assert "4,096" in printed.out
    assert "sample: 4,096 of 12,000 vectors (256 a centroid, which is all that faiss uses)" in printed.err
    assert os.listdir(work / "temp") == []


def sha(work: Path, export: str, *more: str) -> str:
    return trained(arguments(work, export, *more))["provenance"]["blob_sha256"]


def test_model_is_the_same_however_the_export_is_cut_and_run(work: Path, export: str) -> None:
    """Over slices, row groups and worker threads."""
    expected = sha(work, export)
    from transforms import parquet

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parquet, "SLICE_BYTES", 1_000 * D * 4)
        assert sha(work, export) == expected
    assert sha(work, write_export(work / "again", row_group_size=333)) == expected
    assert sha(work, export, "--direct_running_mode", "multi_threading", "--direct_num_workers", "4") == expected
    assert sha(work, export, "--training_threads", "1") == expected
    assert sha(work, export, "--seed", "1") != expected


def test_multi_processing_gives_the_same_model(work: Path, export: str) -> None:
    modes = ["--direct_running_mode", "multi_processing", "--direct_num_workers", "2"]
    assert sha(work, export, *modes) == sha(work, export)


def test_repeated_bundles_give_the_same_model(work: Path, export: str) -> None:
    """Every bundle runs three times and only one result counts, as when workers are lost and their bundles retried."""
    assert sha(work, export, "--direct_runner_bundle_repeat", "2") == sha(work, export)


def test_use_all_vectors_and_max_training_vector_count(work: Path, export: str) -> None:
    few = trained(arguments(work, export, "--max_training_vector_count", "500"))
    everything = trained(arguments(work, export, "--use_all_vectors"))
    assert few["provenance"]["vectors_sampled"] == 500
    assert everything["provenance"]["vectors_sampled"] == ROWS


def test_iterations_and_restarts(work: Path, export: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = trained(arguments(work, export, "--niter", "30", "--nredo", "2"))["provenance"]
    assert (more["niter"], more["nredo"]) == (30, 2)
    usual = trained(arguments(work, export))["provenance"]
    assert (usual["niter"], usual["nredo"]) == (None, None)
    assert more["blob_sha256"] != usual["blob_sha256"]
    assert trained(arguments(work, export, "--nredo", "1"))["provenance"]["blob_sha256"] == usual["blob_sha256"]
    capsys.readouterr()
    train.run(arguments(work, export, "--dry_run"))
    assert "niter" not in capsys.readouterr().out
    train.run(arguments(work, export, "--dry_run", "--niter", "30"))
    printed = capsys.readouterr().out
    assert re.search(r"niter +30\n", printed)
    assert "nredo" not in printed


def test_fields_as_flags_instead_of_a_file(work: Path, export: str) -> None:
    flags = ["--dimension", str(D), "--method", json.dumps(REQUEST["method"]), "--vector_column", "v"]
    where = ["--parquet", export, "--model_dir", str(work / "models")]
    model = trained([*flags, *where])
    assert model["provenance"]["blob_sha256"] == sha(work, export)


def test_flags_win_over_the_file(work: Path, export: str) -> None:
    model = trained(arguments(work, export, "--description", "from a flag", "--space_type", "l2"))
    assert model["description"] == "from a flag"


def test_bad_vectors_up_to_a_limit(work: Path) -> None:
    lists: list[Any] = VECTORS[:5_000].tolist()
    lists[10], lists[4_000] = [1.0], [float("inf")] * D
    (work / "bad").mkdir()
    pq.write_table(pa.table({"v": pa.array(lists, pa.list_(pa.float32()))}), work / "bad" / "a.parquet")
    export = str(work / "bad" / "*.parquet")
    with pytest.raises(TrainingError, match=r"^1 bad vector, 0 allowed .*a.parquet row 10: length 1, expected 16$"):
        train.run(arguments(work, export, "--model_id", "strict", "--use_all_vectors"))
    assert ModelFiles(str(work / "models")).get("strict")["state"] == "failed"
    with pytest.raises(TrainingError, match="2 bad vectors, 1 allowed"):
        train.run(arguments(work, export, "--use_all_vectors", "--max_bad_vectors", "1"))
    model = trained(arguments(work, export, "--use_all_vectors", "--max_bad_vectors", "2", "--model_id", "lax"))
    assert model["provenance"]["vectors_sampled"] == 4_998
    assert rejected_rows(work, "lax") == ["row 10", "row 4000"]


def test_bad_vectors_that_are_met_only_on_reading_again_are_listed_too(work: Path, capsys: Any) -> None:
    """The sample needs all of the few vectors, which this file does not say are few."""
    lists: list[Any] = [None] * 5_000
    lists[::10] = VECTORS[:500].tolist()
    for bad in range(0, 400, 40):
        lists[bad] = [1.0]
    (work / "bad").mkdir()
    table = pa.table({"v": pa.array(lists, pa.list_(pa.float32()))})
    pq.write_table(table, work / "bad" / "a.parquet", write_statistics=False)
    few = ["--max_training_vector_count", "1000", "--eval_vectors", "300", "--max_bad_vectors", "10"]
    model = trained(arguments(work, str(work / "bad" / "*.parquet"), "--model_id", "few", *few))
    assert (model["provenance"]["vectors_in_source"], model["provenance"]["vectors_sampled"]) == (5_000, 490)
    assert model["provenance"]["kept_fraction"] < 0.9
    assert rejected_rows(work, "few") == sorted(f"row {bad}" for bad in range(0, 400, 40))
    printed = capsys.readouterr()
    assert "read all slices again: 1 in" in printed.err
    assert re.search(r"^bad vectors +10$", printed.out, re.MULTILINE)


def rejected_rows(work: Path, model_id: str) -> list[str]:
    lines = (work / "models" / model_id / "rejected.jsonl").read_text().splitlines()
    return [json.loads(line)["row"] for line in lines]


# --- a dry run ---


def test_dry_run_prints_the_plan_and_writes_nothing(
    work: Path, export: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(glob.glob(f"{work}/**", recursive=True))
    assert train.run(arguments(work, export, "--dry_run")) == []
    printed = capsys.readouterr().out
    for part in ("12,000 x 16 float", "4,096 vectors, seed 0", "IVF8,PQ4x4, l2", "MB of memory", "slices"):
        assert part in printed
    assert sorted(glob.glob(f"{work}/**", recursive=True)) == before


# --- bad requests: exit code 2, one line, nothing written ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modeldir", "x"], "unknown flag --modeldir; did you mean --model_dir?"),
        (["--runer", "x"], "unknown flag --runer; did you mean --runner?"),
        (["--zzzz"], "unknown flag --zzzz; see --help"),
        (["stray"], "unexpected argument 'stray'"),
        (["--dimension", "x"], "argument --dimension: dimension is 'x', which is not JSON"),
        (["--dimension", "20"], "has vectors of length 16, expected 20"),
        (["--description", "a, b"], "Model description cannot contain any commas: ','"),
        (["--space_type", "l1"], 'Cannot specify conflicting space types: "[l2]" "[l1]"'),
        (
            ["--method", '{"name": "ivf", "engine": "faiss", "parameters": {"nlist": 20000}}'],
            "parameter validation failed",
        ),
        (
            ["--method", '{"name": "ivf", "engine": "faiss", "parameters": {"nlist": 13000}}'],
            "nlist is 13000, but there are",
        ),
        (["--max_bad_vectors", "-1"], "must be 0 or more"),
        (["--niter", "0"], "niter is 0, expected 1 to 10000"),
        (["--nredo", "-2"], "nredo is -2, expected 1 to 10000"),
        (["--niter", "99999999999"], "niter is 99999999999, expected 1 to 10000"),
        (["--training_threads", "100000"], "training_threads is 100000, but at most 1024 can be started"),
        (["--max_bytes_per_vector", "10"], "--max_bytes_per_vector is for --suggest to choose by"),
        (["--niter", "ten"], "argument --niter: invalid int value: 'ten'"),
        (
            ["--opensearch_url", "http://localhost:9"],
            "give --parquet or --opensearch_url, not both, unless you --publish",
        ),
        (["--publish", "magic"], "argument --publish: invalid choice: 'magic'"),
        (["--publish", "auto"], "set OPENSEARCH_URL"),
        (["--request", "/nowhere.json"], "cannot read request '/nowhere.json'"),
        (["--model_id", "a", "--model_id", "b"], "1 requests and 2 model ids: give each --request a --model_id"),
        (["--query", '{"match_all": {}}'], "--query selects documents of an index"),
        (["--parquet", "/nowhere/*.parquet"], "no Parquet file matches '/nowhere/*.parquet'"),
        (["--vector_column", "w"], "no column 'w' in"),
        (["--model_id", "a/b"], "model_id 'a/b' cannot name a folder"),
        (["--model_id", "a-{day}"], "model_id 'a-{day}' has '{day}', expected one of {date}, {time}, {sha}"),
        (["--overwrite=maybe"], "argument --overwrite: ignored explicit argument 'maybe'"),
        (["--reader", "magic"], "argument --reader: invalid choice: 'magic'"),
        (["--target_version", "1.0"], "1.0"),
    ],
)
def test_bad_requests(
    work: Path, export: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["knn-train", *arguments(work, export, *words)])
    with pytest.raises(SystemExit) as caught:
        train.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert not (work / "models").exists()
    assert os.listdir(work / "temp") == []


def test_too_large_a_table_is_refused_naming_the_issue(work: Path, export: str) -> None:
    pq_encoder = {"name": "pq", "parameters": {"m": 16, "code_size": 12}}
    method = {"name": "ivf", "engine": "faiss", "parameters": {"nlist": 10_000, "encoder": pq_encoder}}
    with pytest.raises(RequestError, match=r"k-NN/issues/3078"):
        train.run(arguments(work, export, "--method", json.dumps(method)))


def test_no_model_dir(work: Path, export: str) -> None:
    with pytest.raises(RequestError, match="say where the model goes: --model_dir FOLDER"):
        train.run(["--request", str(work / "request.json"), "--parquet", export])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--temp_location", "{work}/request.json"],
            "temp_location is '{work}/request.json', but {work}/request.json is no",
        ),
        (["--model_dir", "foo://x"], "cannot use foo://x: Unable to get filesystem"),
        (["--runner", "Foo"], "--runner Foo: Unexpected pipeline runner"),
    ],
)
def test_places_and_runners_that_there_are_not_are_refused_before_any_work(
    work: Path, export: str, words: list[str], message: str
) -> None:
    with pytest.raises(RequestError, match="^" + re.escape(message.format(work=work))):
        train.run(arguments(work, export, *(word.format(work=work) for word in words)))
    assert not (work / "models").exists()


def test_a_full_disk_is_told_in_one_line(work: Path, export: str) -> None:
    limit = 40_000

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(arguments(work, export, "--model_id", "m1"), preexec_fn=no_large_files)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert json.loads(printed.splitlines()[-1])["state"] == "failed"
    assert re.search(r"^failed: cannot write \S+/knn-train-\S+: File too large$", errors.splitlines()[-1])
    assert "Traceback" not in errors


def test_resuming_with_the_same_words_elsewhere_is_not_resuming(
    work: Path, export: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern that is relative means other files in another folder."""
    for name in "ab":
        (work / name).mkdir()
        write_export(work / name / "exports")
    monkeypatch.chdir(work / "a")
    words = arguments(work, "exports/*.parquet")
    with pytest.raises(TrainingError, match="min_recall"):
        train.run([*words, "--min_recall", "1@10"])
    monkeypatch.chdir(work / "b")
    with pytest.raises(RequestError, match="there is no sample to --resume with"):
        train.run([*words, "--resume"])
    monkeypatch.chdir(work / "a")
    assert trained([*words, "--resume"])["provenance"]["resumed"]


def test_an_existing_id_is_refused_and_left_alone(work: Path, export: str) -> None:
    train.run(arguments(work, export, "--model_id", "m1"))
    before = ModelFiles(str(work / "models")).get("m1")
    with pytest.raises(RequestError, match='Model with id="m1" already exists'):
        train.run(arguments(work, export, "--model_id", "m1"))
    assert ModelFiles(str(work / "models")).get("m1") == before
    again = trained(arguments(work, export, "--model_id", "m1", "--overwrite", "--seed", "2"))
    assert again["provenance"]["seed"] == 2


def test_an_id_says_what_was_asked(work: Path, export: str) -> None:
    ids = [
        trained(arguments(work, export, "--model_id", "m-{sha}", "--overwrite", *more))["model_id"]
        for more in ([], [], ["--seed", "1"], ["--max_training_vector_count", "1000"])
    ]
    assert ids[0] == ids[1]
    assert len({*ids}) == 3
    assert all(re.fullmatch("m-[0-9a-f]{8}", each) for each in ids)
    day = trained(arguments(work, export, "--model_id", "m-{date}T{time}"))["model_id"]
    assert re.fullmatch(r"m-20\d{6}T\d{6}", day)


def test_flags_without_a_value_may_have_one() -> None:
    """As the launchers of Dataflow templates write them."""
    options, dry_run = parse(["--overwrite=true", "--use_all_vectors=False", "--no_verify=TRUE"])
    assert (options.overwrite, options.use_all_vectors, options.verify, dry_run) == (True, False, False, False)


@pytest.mark.parametrize(
    ("words", "dry_run"), [(["--dry_run"], True), (["--dry_run=true"], True), (["--dry_run=False"], False), ([], False)]
)
def test_a_dry_run_is_what_was_asked_for(words: list[str], dry_run: bool) -> None:
    assert parse(["--seed", "1", *words])[1] == dry_run


def test_a_dry_run_is_so_or_not() -> None:
    with pytest.raises(RequestError, match=r"^dry_run is 'yes', expected nothing, true or false$"):
        parse(["--dry_run=yes"])


def test_duplicate_keys_in_the_file_are_seen(work: Path, export: str) -> None:
    (work / "request.json").write_text(json.dumps(REQUEST)[:-1] + ', "dimension": 16}')
    with pytest.raises(RequestError, match="Duplicate field 'dimension'"):
        train.run(arguments(work, export))


ACCELERATOR = "type:nvidia-tesla-t4;count:1;install-nvidia-driver"


@pytest.mark.parametrize("accelerator", [None, ACCELERATOR])
def test_the_training_step_asks_for_what_the_plan_states(work: Path, export: str, accelerator: str | None) -> None:
    """And no other step does, but the one that is fused with it."""
    options, _ = parse(arguments(work, export, *(["--accelerator", accelerator] if accelerator else [])))
    (plan,) = make_plans(options)
    pipeline = beam.Pipeline(runner=train.LOCAL_RUNNER)
    train.build(pipeline, [plan], options, str(work / "temp"))
    components = pipeline.to_runner_api().components
    asked = {}
    for transform in components.transforms.values():
        hints = components.environments[transform.environment_id].resource_hints if transform.environment_id else {}
        if hints:
            asked[transform.unique_name] = {urn.split(":")[2]: value.decode() for urn, value in hints.items()}
    wanted = {"min_ram_bytes": str(plan.memory_bytes + 300_000_000)}
    if accelerator:
        wanted["accelerator"] = accelerator
    steps = ("Train model", "Train model/Train", "Write model", "Write model/Write model files")
    assert asked == dict.fromkeys(steps, wanted)


# --- failed runs: exit code 1, one line, the model says why ---


def test_a_dead_trainer_fails_the_model(work: Path, export: str) -> None:
    fields = json.dumps({**REQUEST["method"], "parameters": {"nlist": 3_000}})
    child = start([*arguments(work, export, "--model_id", "m1", "--use_all_vectors"), "--method", fields])
    deadline = time.monotonic() + 60
    trainer: list[int] = []
    while not trainer and time.monotonic() < deadline:
        found = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True, check=False).stdout
        trainer = [int(pid) for pid in found.split()]
        time.sleep(0.02)
    os.kill(trainer[0], signal.SIGKILL)
    printed, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert errors.splitlines()[-1].startswith("failed: the training process was killed (SIGKILL)")
    assert "Traceback" not in errors
    told = json.loads(printed.splitlines()[-1])
    assert (told["model_id"], told["state"], told["published"]) == ("m1", "failed", False)
    assert told["error"].startswith("the training process was killed (SIGKILL)")
    model = ModelFiles(str(work / "models")).get("m1")
    assert model["state"] == "failed"
    assert "ran out of memory" in model["error"]
    (kept,) = os.listdir(work / "temp")
    assert f"the sample is kept in {work}/temp/{kept}: the same command with --resume" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up(work: Path, export: str, number: int) -> None:
    fields = json.dumps({**REQUEST["method"], "parameters": {"nlist": 3_000}})
    child = start([*arguments(work, export, "--model_id", "m1", "--use_all_vectors"), "--method", fields])
    assert child.stdout is not None
    child.stdout.readline()  # the model id: the run has begun
    time.sleep(0.5)
    child.send_signal(number)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 1
    assert re.search(r"^failed: interrupted$", errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert ModelFiles(str(work / "models")).get("m1")["state"] == "failed"
    assert os.listdir(work / "temp") == []


def test_folder_of_a_killed_run_is_swept_by_the_next(work: Path, export: str) -> None:
    fields = json.dumps({**REQUEST["method"], "parameters": {"nlist": 3_000}})
    child = start([*arguments(work, export, "--model_id", "m1", "--use_all_vectors"), "--method", fields])
    assert child.stdout is not None
    child.stdout.readline()
    while not os.listdir(work / "temp"):
        time.sleep(0.02)
    child.kill()
    child.wait()
    left = os.listdir(work / "temp")
    assert len(left) == 1
    with run_folder.create(str(work / "temp")) as alive:  # a run that lives is not swept
        sha(work, export)
        assert os.listdir(work / "temp") == [os.path.basename(alive.path)]
    assert os.listdir(work / "temp") == []


# --- resuming ---


def fail_in_training(work: Path, export: str, *more: str) -> str:
    """A run that reads and then fails; the folder that it leaves."""
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("transforms.training.train_in_process", _no_training)
        with pytest.raises(TrainingError, match="no training today"):
            train.run(arguments(work, export, *more))
    (kept,) = os.listdir(work / "temp")
    return kept


def test_a_run_that_failed_in_training_is_resumed_without_reading(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = write_export(tmp_path / "export")
    expected = sha(work, export)
    fail_in_training(work, export, "--model_id", "m1")
    shutil.rmtree(tmp_path / "export")
    capsys.readouterr()
    model = trained(arguments(work, export, "--model_id", "m1", "--resume"))
    assert model["provenance"]["blob_sha256"] == expected
    assert model["provenance"]["resumed"]
    assert model["provenance"]["vectors_in_source"] == ROWS
    assert "read slices" not in capsys.readouterr().err
    assert os.listdir(work / "temp") == []


def test_a_killed_run_is_resumed(work: Path, export: str) -> None:
    expected = sha(work, export)
    hold = work / "hold.py"
    hold.write_text(
        "import time\nfrom pipelines import train\nfrom transforms import training\n"
        "training.train_in_process = lambda *_: time.sleep(600)\ntrain.main()\n"
    )
    child = subprocess.Popen([sys.executable, str(hold), *arguments(work, export, "--model_id", "m1")], stdout=-1)
    deadline = time.monotonic() + 60
    while not glob.glob(f"{work}/temp/*/sample-*.json") and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(RequestError, match="there is no sample to --resume with"):  # its run is alive
        train.run(arguments(work, export, "--model_id", "m1", "--resume"))
    child.kill()
    child.communicate()
    assert trained(arguments(work, export, "--model_id", "m1", "--resume"))["provenance"]["blob_sha256"] == expected
    assert os.listdir(work / "temp") == []


def test_what_is_kept_is_used_for_the_same_vectors_only(work: Path, export: str) -> None:
    with pytest.raises(RequestError, match="there is no sample to --resume with"):
        train.run(arguments(work, export, "--resume"))
    kept = fail_in_training(work, export, "--max_training_vector_count", "500")
    with pytest.raises(RequestError, match=r'there is no sample to --resume with, of .*"seed": 1'):
        train.run(arguments(work, export, "--resume", "--seed", "1"))
    with pytest.raises(RequestError, match=r"is too small to --resume with: 4,096 are wanted$"):
        train.run(arguments(work, export, "--resume"))
    sha(work, export, "--seed", "1")  # another run leaves alone what was kept
    assert os.listdir(work / "temp") == [kept]
    assert not train.run(arguments(work, export, "--max_training_vector_count", "400", "--resume", "--dry_run"))
    assert os.listdir(work / "temp") == [kept]
    alone = sha(work, export, "--max_training_vector_count", "400", "--resume")
    assert os.listdir(work / "temp") == []
    assert alone == sha(work, export, "--max_training_vector_count", "400")


def test_a_run_of_the_same_vectors_replaces_what_was_kept(work: Path, export: str) -> None:
    fail_in_training(work, export)
    fail_in_training(work, export)  # asserts that one folder is left
    sha(work, export)
    assert os.listdir(work / "temp") == []


def test_what_another_version_kept_is_in_nobodys_way(work: Path, export: str) -> None:
    kept = fail_in_training(work, export)
    (note,) = (work / "temp" / kept).glob("sample-*.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "summary": {"of": "another version"}}))
    with pytest.raises(RequestError, match="there is no sample to --resume with"):
        train.run(arguments(work, export, "--resume"))
    assert sha(work, export)


def test_what_was_kept_is_swept_after_a_day(work: Path, export: str) -> None:
    kept = fail_in_training(work, export)
    yesterday = time.time() - run_folder.KEPT_S - 1
    os.utime(work / "temp" / kept / "kept", (yesterday, yesterday))
    sha(work, export, "--seed", "1")
    assert os.listdir(work / "temp") == []


def test_a_failure_does_not_pass_for_the_model_it_was_to_replace(work: Path, export: str) -> None:
    before = trained(arguments(work, export, "--model_id", "m1"))
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("transforms.training.train_in_process", _no_training)
        with pytest.raises(TrainingError, match=r"^no training today$"):
            train.run(arguments(work, export, "--model_id", "m1", "--overwrite"))
    assert ModelFiles(str(work / "models")).get("m1") == before


def test_the_last_line_is_about_the_run_and_not_about_the_model_it_was_to_replace(work: Path, capsys: Any) -> None:
    good, bad = write_export(work / "good"), write_export(work / "bad", vectors=np.full_like(VECTORS[:500], np.nan))
    before = trained(arguments(work, good, "--model_id", "m1"))
    capsys.readouterr()
    with pytest.raises(TrainingError, match="1 bad vector"):
        train.run(arguments(work, bad, "--model_id", "m1", "--overwrite"))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["state"] == "failed"
    assert "1 bad vector" in last["error"]
    assert ModelFiles(str(work / "models")).get("m1") == before


def _no_training(*_: Any) -> Any:
    raise TrainingError("no training today")


# --- several requests in one run ---


def requests(work: Path, **methods: Mapping[str, Any]) -> list[str]:
    """Flags for a request and a model of each name."""
    words = []
    for name, method in methods.items():
        (work / f"{name}.json").write_text(json.dumps({**REQUEST, "method": method}))
        words += ["--request", str(work / f"{name}.json"), "--model_id", name]
    return words


FLAT = {"name": "ivf", "engine": "faiss", "space_type": "l2", "parameters": {"nlist": 4}}


def test_several_models_from_one_reading_are_what_each_would_be_alone(
    work: Path, export: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--parquet", export, "--model_dir", str(work / "models"), "--temp_location", str(work / "temp")]
    alone = {
        name: train.run([*requests(work, **{name: m}), *where])[0]
        for name, m in (("a", FLAT), ("b", REQUEST["method"]))
    }
    capsys.readouterr()
    both = train.run([*requests(work, a=FLAT, b=REQUEST["method"]), *where, "--overwrite"])
    assert [model["model_id"] for model in both] == ["a", "b"]
    for model in both:
        before = alone[model["model_id"]]["provenance"]
        assert model["provenance"]["vectors_sampled"] == before["vectors_sampled"]
        assert model["provenance"]["blob_sha256"] == before["blob_sha256"]
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()[:2]] == [{"model_id": "a"}, {"model_id": "b"}]
    assert printed.err.count("reading ") == 1
    assert os.listdir(work / "temp") == []


def test_requests_for_other_vectors_are_read_each_for_itself(work: Path, export: str) -> None:
    table = pq.read_table(Path(export).parent / "0.parquet")
    (work / "two").mkdir()
    twice = table.append_column("w", table.column("v").combine_chunks().take(pa.array(range(len(table))[::-1])))
    pq.write_table(twice, work / "two" / "a.parquet")
    words = requests(work, a=FLAT, b=FLAT)
    (work / "b.json").write_text(json.dumps({**REQUEST, "method": FLAT, "training_field": "w"}))
    where = ["--parquet", str(work / "two" / "*.parquet"), "--model_dir", str(work / "models")]
    one, two = train.run([*words, *where])
    assert one["provenance"]["blob_sha256"] != two["provenance"]["blob_sha256"]
    again = trained([*words[4:6], *where])
    assert again["provenance"]["blob_sha256"] == two["provenance"]["blob_sha256"]


def test_each_of_several_models_fails_alone(work: Path, export: str) -> None:
    where = ["--parquet", export, "--model_dir", str(work / "models"), "--temp_location", str(work / "temp")]
    real = train_in_process

    def fails_for_flat(job: Any, *rest: Any) -> Any:
        return _no_training() if job.body["method"]["parameters"]["nlist"] == 4 else real(job, *rest)

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("transforms.training.train_in_process", fails_for_flat)
        with pytest.raises(TrainingError, match=r'^model "a": no training today$'):
            train.run([*requests(work, a=FLAT, b=REQUEST["method"]), *where])
    files = ModelFiles(str(work / "models"))
    assert (files.get("a")["state"], files.get("a")["error"]) == ("failed", "no training today")
    assert files.get("b")["state"] == "created"


def test_of_several_requests_all_or_none_begin(work: Path, export: str) -> None:
    where = ["--parquet", export, "--model_dir", str(work / "models")]
    train.run([*requests(work, b=FLAT), *where])
    with pytest.raises(RequestError, match='Model with id="b" already exists'):
        train.run([*requests(work, a=FLAT, b=FLAT), *where])
    assert os.listdir(work / "models") == ["b"]
    words = requests(work, a=FLAT, c={**FLAT, "parameters": {"nlist": 0}})
    with pytest.raises(RequestError, match=r"^\S+/c.json: "):
        train.run([*words, *where])
    with pytest.raises(RequestError, match="each model needs an id of its own"):
        train.run([*words[:4], *words[:4], *where])


# --- from a live cluster ---


@pytest.fixture(scope="module")
def index(opensearch: OpenSearchServer) -> Iterator[OpenSearchServer]:
    client = opensearch.client()
    field = {"type": "knn_vector", "dimension": D}
    settings = {"number_of_shards": 3, "number_of_replicas": 0}
    client.indices.create(index="vectors", body={"settings": settings, "mappings": {"properties": {"v": field}}})
    for start_row in range(0, ROWS, 3_000):
        rows = range(start_row, min(ROWS, start_row + 3_000))
        actions = [
            part for row in rows for part in ({"index": {"_id": str(row)}}, {"v": VECTORS[row].tolist(), "n": row})
        ]
        assert not client.bulk(index="vectors", body=actions)["errors"]
    client.indices.refresh(index="vectors")
    yield opensearch
    client.indices.delete(index="vectors")


def from_cluster(work: Path, server: OpenSearchServer, *more: str) -> Mapping[str, Any]:
    where = ["--opensearch_url", server.url, "--model_dir", str(work / "models"), "--temp_location", str(work / "temp")]
    version = ["--target_version", server.version]
    model = trained(["--request", str(work / "request.json"), *where, *version, *more])
    return model


def test_trains_from_opensearch(work: Path, index: OpenSearchServer, capsys: pytest.CaptureFixture[str]) -> None:
    one = from_cluster(work, index, "--model_id", "m1")["provenance"]
    assert (one["vectors_in_source"], one["vectors_sampled"]) == (ROWS, SAMPLE)
    assert re.search(r"bytes received +[1-9][\d,]+\n", capsys.readouterr().out)
    assert ModelFiles(str(work / "models")).get("m1")["model_version"] == index.version
    # The same model from more slices, small pages, another way of reading, worker threads and repeated bundles.
    for more in (
        ["--slices", "7"],
        ["--search_size", "100", "--max_requests_in_flight", "1"],
        ["--search_size", "100", "--max_requests_in_flight", "9"],
        ["--reader", "source"],
        ["--slices", "4", "--direct_running_mode", "multi_threading", "--direct_num_workers", "4"],
        ["--direct_runner_bundle_repeat", "1"],
    ):
        assert from_cluster(work, index, *more)["provenance"]["blob_sha256"] == one["blob_sha256"], more
    assert from_cluster(work, index, "--seed", "1")["provenance"]["blob_sha256"] != one["blob_sha256"]


def test_trains_on_what_a_query_finds(work: Path, index: OpenSearchServer) -> None:
    query = json.dumps({"range": {"n": {"lt": 2_000}}})
    told = from_cluster(work, index, "--query", query)["provenance"]
    assert (told["vectors_in_source"], told["vectors_sampled"]) == (2_000, 2_000)
    assert told["query"] == {"range": {"n": {"lt": 2_000}}}


def test_dry_run_contacts_the_cluster_and_leaves_nothing_there(
    work: Path, index: OpenSearchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--opensearch_url", index.url, "--target_version", index.version]
    assert train.run(["--request", str(work / "request.json"), *where, "--dry_run"]) == []
    assert "12,000 x 16 float" in capsys.readouterr().out
    stats = index.client().nodes.stats(metric="indices")["nodes"].values()
    assert sum(node["indices"]["search"]["open_contexts"] for node in stats) == 0


def test_trains_and_publishes(work: Path, index: OpenSearchServer, capsys: pytest.CaptureFixture[str]) -> None:
    """From one cluster into the same: exact where the codebooks can be swapped in, and by delegation of the sample."""
    with Session(OpenSearchConnection(index.url)) as session:
        swapped = from_cluster(work, index, "--model_id", "swapped", "--publish", "auto")
        told = swapped["provenance"]["publication"]
        assert (told["state"], told["route"], told["exact"]) == ("created", "swap", True)
        assert model_index.fetch(session, "swapped").blob == ModelFiles(str(work / "models")).blob("swapped")
        assert "published by" in capsys.readouterr().out

        told = from_cluster(work, index, "--model_id", "delegated", "--publish", "delegate")["provenance"]
        assert told["publication"]["route"] == "delegate"
        assert len(index.trainer.trainings[-1].vectors) == told["vectors_sampled"] == SAMPLE
        assert model_index.fetch(session, "delegated").blob is not None

        before = index.client().indices.stats(index="vectors")["_all"]["total"]["search"]["query_total"]
        with pytest.raises(RequestError, match=r'Model id "swapped" is taken, by a model in state created'):
            from_cluster(work, index, "--model_id", "swapped", "--publish", "auto", "--overwrite")
        after = index.client().indices.stats(index="vectors")["_all"]["total"]["search"]["query_total"]
        assert after == before  # refused before a vector was read
        assert temporary_index.find(session) == []
        for model_id in ("swapped", "delegated"):
            model_index.delete_model(session, model_id)


def test_parquet_into_a_cluster_by_its_own_rules(work: Path, export: str, index: OpenSearchServer) -> None:
    words = arguments(work, export, "--model_id", "m1", "--publish", "swap", "--opensearch_url", index.url)
    model = trained(words)
    assert model["model_version"] == index.version  # without --target_version
    with Session(OpenSearchConnection(index.url)) as session:
        assert model_index.fetch(session, "m1").blob == ModelFiles(str(work / "models")).blob("m1")
        model_index.delete_model(session, "m1")


def test_an_interrupted_run_takes_its_publication_back(work: Path, export: str, opensearch_3: OpenSearchServer) -> None:
    words = arguments(work, export, "--model_id", "m1", "--publish", "swap", "--opensearch_url", opensearch_3.url)
    with Session(OpenSearchConnection(opensearch_3.url)) as session:
        with opensearch_3.trainer.held():
            child = start(words)
            while model_index.get_model(session, "m1") is None:
                assert child.poll() is None
                time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 1
        assert errors.splitlines()[-1].startswith("failed: ")
        assert model_index.get_model(session, "m1") is None
        assert temporary_index.find(session) == []


def test_a_publication_that_fails_leaves_the_model(
    work: Path, export: str, index: OpenSearchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(work, export, "--model_id", "m1", "--publish", "swap", "--opensearch_url", index.url)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(model_index, "replace_blob", _no_swap)
        message = r"^it was trained but not published: not swapped today; knn-models publish m1 tries that alone$"
        with pytest.raises(TrainingError, match=message):
            train.run(words)
    files = ModelFiles(str(work / "models"))
    assert files.get("m1")["state"] == "created"
    assert files.get("m1")["provenance"]["publication"]["error"] == "not swapped today"
    models.run(["publish", "m1", "--model_dir", files.model_dir, "--opensearch_url", index.url])
    assert '"outcome": "published"' in capsys.readouterr().out
    with Session(OpenSearchConnection(index.url)) as session:
        assert model_index.delete_model(session, "m1")
        assert temporary_index.find(session) == []


def _no_swap(*_: Any) -> None:
    raise TrainingError("not swapped today")


def test_dry_run_says_how_it_would_publish(
    work: Path, export: str, index: OpenSearchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(work, export, "--publish", "auto", "--opensearch_url", index.url, "--dry_run")
    assert train.run(words) == []
    assert re.search(r"^publish +swap: an IVF-PQ cannot be replayed", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(RequestError, match="route replay is not possible"):
        train.run([*words, "--publish", "replay"])
    with pytest.raises(RequestError, match="--publish needs --model_dir too"):
        train.run(["--request", str(work / "request.json"), "--parquet", export, "--publish", "auto", "--dry_run"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--training_index", "nope"], 2, 'error: Index "nope" does not exist.'),
        (["--training_field", "n"], 2, 'error: Field "n" is not of type knn_vector.'),
        (["--training_field", "w"], 2, 'error: Field "w" does not exist.'),
        (["--max_requests_in_flight", "0"], 2, "max_requests_in_flight is 0, expected 1 to 64"),
        (["--dimension", "32"], 2, "which is different from dimension specified in the training request: 32"),
        (["--opensearch_url", "http://localhost:9"], 1, "cannot be reached: connection refused"),
        (["--opensearch_url", "http://user:secret@localhost:9"], 2, "OPENSEARCH_"),
    ],
)
def test_what_does_not_fit_the_cluster(
    work: Path,
    index: OpenSearchServer,
    words: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ["--opensearch_url", index.url, "--model_dir", str(work / "models"), "--target_version", index.version]
    monkeypatch.setattr("sys.argv", ["knn-train", "--request", str(work / "request.json"), *where, *words])
    with pytest.raises(SystemExit) as caught:
        train.main()
    printed = capsys.readouterr()
    assert caught.value.code == code
    assert message in printed.err
    assert "secret" not in printed.err
    assert "Traceback" not in printed.err
    assert not (work / "models").exists()


# --- options ---


def test_body_puts_flags_over_the_file() -> None:
    options = TrainOptions(["--dimension", "3", "--mode", "on_disk"])
    assert json.loads(body(options, None)) == {"dimension": 3, "mode": "on_disk"}
    assert json.loads(body(options, b'{"dimension": 4, "engine": "faiss"}')) == {
        "dimension": 3,
        "mode": "on_disk",
        "engine": "faiss",
    }
    with pytest.raises(RequestError, match="request body is not valid JSON"):
        body(options, b"{not json")
    with pytest.raises(RequestError, match="Duplicate field 'mode'"):
        body(options, b'{"mode": "on_disk", "mode": "on_disk"}')


def test_dry_run_is_ours_and_not_beam_s() -> None:
    options, dry_run = parse(["--dry_run", "--seed", "4", "--runner", "FnApiRunner"])
    assert dry_run
    assert options.seed == 4


def test_help_lists_our_flags_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["knn-train", "--help"])
    train.main()
    printed = capsys.readouterr().out
    assert "--max_training_vector_count" in printed
    assert "--dataflow_endpoint" not in printed
