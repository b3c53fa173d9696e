# SPDX-License-Identifier: Apache-2.0
"""The templates' commands, run as they are against a real OpenSearch; only paths, the URL and the size of the request
are this machine's. Images, clusters and clouds are not to be had here: `templates/README.md` says what that leaves
open.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import template_env
from tests.google_cloud import GoogleCloud
from tests.opensearch.support import fill
from tests.opensearch_server import OpenSearchServer
from tests.runners import go_install, required
from tests.runners.flink_cluster import FlinkCluster, free_ports
from tests.template_commands import in_manifests, launch_parameters
from tests.template_env import TEMPLATES
from transforms.opensearch import OpenSearchConnection, Session, model_index

BIN = Path(sys.executable).parent
#: Options that a launch on Dataflow has; with Beam's own `dry_run` nothing is sent.
DATAFLOW = (
    "--runner=DataflowRunner",
    "--project=some-project",
    "--region=us-central1",
    "--temp_location=gs://bucket/temp",
    "--staging_location=gs://bucket/staging",
)
PASSWORD = "not-in-the-graph-7"

# What templates/beam-yaml/train.yaml reads.
INDEX, FIELD, DIMENSION = "products", "embedding", 128
REQUEST = {
    "training_index": INDEX,
    "training_field": FIELD,
    "dimension": DIMENSION,
    "max_training_vector_count": 1000,
    "method": {
        "name": "ivf",
        "engine": "faiss",
        "space_type": "l2",
        "parameters": {"nlist": 16, "nprobes": 4, "encoder": {"name": "pq", "parameters": {"m": 16, "code_size": 4}}},
    },
}


def vectors(seed: int, scale: float = 1.0) -> np.ndarray:
    """(1500, 128) float32 around 40 centres, which `seed` decides."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, DIMENSION)) * scale
    return (centres[rng.integers(0, 40, 1500)] + 0.3 * rng.standard_normal((1500, DIMENSION))).astype("<f4")


@pytest.fixture
def products(opensearch_3: OpenSearchServer) -> Iterator[OpenSearchServer]:
    fill(opensearch_3, INDEX, vectors(1), field=FIELD)
    yield opensearch_3
    opensearch_3.client().indices.delete(index=INDEX)
    with Session(OpenSearchConnection(opensearch_3.url)) as session:
        for model in model_index.list_models(session):
            model_index.delete_model(session, model["model_id"])


def in_cluster(server: OpenSearchServer) -> dict[str, str]:
    """Model id to state."""
    with Session(OpenSearchConnection(server.url)) as session:
        return {model["model_id"]: model["state"] for model in model_index.list_models(session)}


def environment(server: OpenSearchServer, **more: str) -> dict[str, str]:
    return template_env.checkout_environment(OPENSEARCH_URL=server.url, PATH=f"{BIN}:{os.environ['PATH']}", **more)


def result(output: str) -> dict[str, Any]:
    """The last line."""
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def test_kubernetes(products: OpenSearchServer, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    for folder in ("models", "scratch"):
        (tmp_path / folder).mkdir()
    here = {"/etc/knn-train": tmp_path, "/models": tmp_path / "models", "/scratch": tmp_path / "scratch"}
    done = []
    for command in in_manifests():
        if not command.where.startswith("kubernetes/"):
            continue
        words = command.words
        for path, local in {**here, command.environment["OPENSEARCH_URL"]: products.url}.items():
            words = [word.replace(f"={path}", f"={local}", 1) for word in words]
        ran = template_env.run([str(BIN / words[0]), *words[1:]], env=environment(products))
        assert ran.returncode == 0, ran.stderr[-2000:]
        done.append(result(ran.stdout))
    trained, pruned = done
    assert trained["published"]
    assert trained["state"] == "created"
    assert in_cluster(products) == {trained["model_id"]: "created"}
    assert [(each["place"], each["result"], each["reason"]) for each in pruned] == [
        ("model_dir", "kept", "one of the 3 newest"),
        ("cluster", "kept", "one of the 3 newest"),
    ]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_cron(products: OpenSearchServer, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    command = ["sh", str(TEMPLATES / "cron/retrain.sh"), str(tmp_path)]
    with (tmp_path / "retrain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = template_env.run(command, env=environment(products))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "another run is at it\n")
    ran = template_env.run(command, env=environment(products))
    assert ran.returncode == 0, ran.stderr[-2000:]
    done = result(ran.stdout)
    assert (done["state"], done["published"]) == ("created", True)
    assert in_cluster(products) == {done["model_id"]: "created"}
    (tmp_path / "request.json").write_text("{}")
    ran = template_env.run(command, env=environment(products))
    assert (ran.returncode, ran.stdout) == (2, "")


# --- Flink ---------------------------------------------------------------------------------------------------------


@contextmanager
def worker_pool(python: Path, log: Path) -> Iterator[int]:
    """The pool that boot starts in the image when it is told `--worker_pool`; gives its port."""
    (port,) = free_ports(1)
    command = [str(python), "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
    command.append(f"--container_executable={go_install('python/container')}")
    path = f"{python.parent}:{os.environ['PATH']}"  # the pool starts `python`, whichever that is
    env = template_env.checkout_environment(PATH=path, RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT="1")
    with log.open("w") as out:
        options: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        pool = subprocess.Popen(command, env=env, cwd=log.parent, **options)
    try:
        yield port
    finally:
        os.killpg(pool.pid, signal.SIGKILL)
        pool.wait()


def test_flink(products: OpenSearchServer, tmp_path: Path) -> None:
    """The submitter's command and a pool of workers beside one task manager: two cannot share one on a machine."""
    python = required(template_env.image_python)
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    (tmp_path / "temp").mkdir()
    (command,) = [each for each in in_manifests() if each.where.startswith("flink/") and each.words[0] == "knn-train"]
    with closing(required(lambda: FlinkCluster(1))) as cluster, worker_pool(python, tmp_path / "pool.log") as port:
        cluster.start()
        here = {
            "--request=/etc/knn-train": f"--request={tmp_path}",
            "=/shared": f"={tmp_path}",
            "--job_endpoint=localhost:8099": cluster.job_endpoint,
            "=localhost:50000": f"=localhost:{port}",
            "--parallelism=4": "--parallelism=1",
        }
        words = command.words
        for ours, theirs in here.items():
            words = [word.replace(ours, theirs) for word in words]
        env = template_env.checkout_environment(OPENSEARCH_URL=products.url)
        ran = template_env.run([str(python), "-m", "pipelines.train", *words[1:]], env=env)
    assert ran.returncode == 0, ran.stderr[-4000:] + (tmp_path / "pool.log").read_text()[-4000:]
    done = result(ran.stdout)
    assert (done["state"], done["published"]) == ("created", True)
    assert in_cluster(products) == {done["model_id"]: "created"}
    assert list((tmp_path / "temp").iterdir()) == []


def test_scheduled_retraining(products: OpenSearchServer, tmp_path: Path) -> None:
    """Unchanged vectors keep the model, drifted ones replace it, and the old ones go, but for one that is used."""
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    # Four Sundays pass here within a minute.
    text = (TEMPLATES / "cron/retrain.sh").read_text().replace("{date}", "{date}-{time}")
    script = tmp_path / "retrain.sh"
    script.write_text(text.replace("--keep 3", "--keep 1"))

    def sunday() -> dict[str, Any]:
        ran = template_env.run(["sh", str(script), str(tmp_path)], env=environment(products))
        assert ran.returncode == 0, ran.stderr[-2000:]
        return result(ran.stdout)

    first = sunday()
    assert (first["state"], first["published"], first["kept"]) == ("created", True, "")
    second = sunday()
    assert (second["state"], second["model_id"], second["published"]) == ("created", first["model_id"], False)
    assert "nothing was trained" in second["kept"]
    assert in_cluster(products) == {first["model_id"]: "created"}

    client = products.client()
    uses = {"properties": {"v": {"type": "knn_vector", "model_id": first["model_id"]}}}
    client.indices.create(index="serving", body={"settings": {"index.knn": True}, "mappings": uses})
    fill(products, INDEX, vectors(2, scale=3.0), field=FIELD)
    third = sunday()
    assert (third["state"], third["published"]) == ("created", True)
    assert in_cluster(products) == {first["model_id"]: "created", third["model_id"]: "created"}

    client.indices.delete(index="serving")
    fourth = sunday()
    assert fourth["model_id"] == third["model_id"]
    assert fourth["kept"]
    assert in_cluster(products) == {third["model_id"]: "created"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == [third["model_id"]]


# --- Dataflow ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(products: OpenSearchServer, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs a program with the images' packages and the flags that the workflow sends, and returns what it printed."""
    python = required(template_env.image_python)
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    given = {**launch_parameters(), "request": f"{tmp_path}/request.json", "opensearch_url": products.url}

    def run(program: list[str], *more: str, **parameters: str) -> str:
        flags = [f"--{name}={value}" for name, value in {**given, **parameters}.items()]
        secrets = {"OPENSEARCH_USERNAME": "me", "OPENSEARCH_PASSWORD": PASSWORD}
        env = template_env.checkout_environment(**secrets, **cloud.environment)
        ran = template_env.run([str(python), *program, *flags, *DATAFLOW, *more], env=env, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return ran.stdout

    with GoogleCloud() as cloud:
        yield run


def test_dataflow_s_job_graph(launch: Callable[..., str]) -> None:
    """As far as Beam goes without a cloud: everything but sending it."""
    graph = result(launch(["-m", "tests.dataflow_graph"]))
    assert "OPENSEARCH_PASSWORD" in graph["texts"]  # the name: so pickled steps were really unpacked
    assert PASSWORD not in graph["texts"]
    # Dataflow's limit is 10 MB; what is here does not grow with the data.
    assert graph["bytes"] < 200_000
    assert {"Train model/Train", "Publish model/Publish"} <= set(graph["labels"])
    assert int(graph["hints"]["Train model/Train"]["beam:resources:min_ram_bytes:v1"]) > 0


def test_dataflow_s_launcher_hands_the_job_over(launch: Callable[..., str], tmp_path: Path) -> None:
    """A launcher is told where to leave the job, and must end without waiting for it."""
    # Beam's own dry run, for which there is no flag beside ours: everything but sending the job.
    dry = "from apache_beam.options.pipeline_options import TestOptions; TestOptions.dry_run = True"
    launcher = ["-c", f"{dry}; import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"]
    launcher.append(str(TEMPLATES / "dataflow/launch.py"))
    printed = launch(
        launcher,
        "--template_location=gs://bucket/staging/job_object",
        model_dir=str(tmp_path / "models"),
        overwrite="true",
    )
    assert result(printed)["state"] == "training"


# --- Airflow -------------------------------------------------------------------------------------------------------

LOADED = """
import json
from airflow.dag_processing.dagbag import DagBag
bag = DagBag({folder!r})
print(json.dumps({{"errors": bag.import_errors, "tasks": {{d.dag_id: sorted(d.task_ids) for d in bag.dags.values()}}}}))
"""


def test_airflow(products: OpenSearchServer, tmp_path: Path) -> None:
    python = required(template_env.airflow_python)
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    host, _, port = products.url.removeprefix("http://").rpartition(":")
    connection = {"conn_type": "generic", "schema": "http", "host": host, "port": int(port), "login": "me"}
    home = {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(TEMPLATES / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW_CONN_OPENSEARCH": json.dumps({**connection, "password": PASSWORD}),
        "KNN_TRAIN_BIN": str(BIN),
        "KNN_TRAIN_FOLDER": str(tmp_path),
    }
    env = environment(products, **home)
    del env["PYTHONPATH"]
    airflow = str(python.with_name("airflow"))
    loaded = template_env.run([str(python), "-c", LOADED.format(folder=str(TEMPLATES / "airflow"))], env=env)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert result(loaded.stdout) == {
        "errors": {},
        "tasks": {"train_knn_model": ["gate", "notify", "prune", "publish", "train"]},
    }
    migrated = template_env.run([airflow, "db", "migrate"], env=env)
    assert migrated.returncode == 0, migrated.stderr[-2000:]
    ran = template_env.run([airflow, "dags", "test", "train_knn_model"], env=env)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    (created,) = in_cluster(products).items()
    assert created[1] == "created"
    assert f"{created[0]} is in the cluster, by swap" in ran.stdout + ran.stderr
    assert PASSWORD not in ran.stdout + ran.stderr


# --- Beam YAML -----------------------------------------------------------------------------------------------------


def test_beam_yaml(products: OpenSearchServer, tmp_path: Path) -> None:
    python = required(template_env.image_python)
    (tmp_path / "temp").mkdir()
    pipeline = TEMPLATES / "beam-yaml/train.yaml"
    command = [str(python), "-m", "apache_beam.yaml.main", f"--yaml_pipeline_file={pipeline}", "--runner=FnApiRunner"]
    env = template_env.checkout_environment(OPENSEARCH_URL=products.url, NO_GCE_CHECK="true")
    ran = template_env.run(command, env=env, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-4000:]
    ((model_id, state),) = in_cluster(products).items()
    assert state == "created"
    assert model_id.startswith("products-")
    assert model_id in ran.stdout + ran.stderr
