# SPDX-License-Identifier: Apache-2.0
"""The templates' images, built and run: `make images`. Not part of `make test`: it takes root and a Docker daemon.

Where there is no daemon one is started (`dockerd`, Debian's docker.io), without a network of its own. Base images that
cannot be pulled are made here: Python's from Debian's packages (`debootstrap`), Beam's from its boot program, which is
what the templates take of it. Dataflow's launcher cannot be made, so that image is built without it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.object_store import object_store
from tests.opensearch_home import Missing
from tests.opensearch_server import die_with_parent
from tests.runners import CACHE, CHECKOUT, call, go_install, required
from tests.runners.flink_cluster import FlinkCluster
from tests.runners.job import REQUEST, knn_train
from tests.test_object_store import train

PYTHON, SDK = "python:3.11-slim-bookworm", "apache/beam_python3.11_sdk:2.77.0"
LAUNCHER = re.compile(r"^(FROM gcr\.io/dataflow-templates-base/|COPY --from=launcher ).*\n", re.MULTILINE)
#: BuildKit is a program of its own that Debian does not have.
ENVIRONMENT = {**os.environ, "DOCKER_BUILDKIT": "0"}
#: What tells pip, here, where packages are and whom to trust.
TRUST = ("PIP_CERT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def docker(*words: str, **options: object) -> str:
    return call(["docker", *words], env=ENVIRONMENT, **options).strip()


def answers() -> bool:
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def dockerd() -> str | None:
    """The program to start; None if a daemon answers already."""
    if shutil.which("docker") is None:
        raise Missing("docker is not on PATH")
    if answers():
        return None
    program = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or os.geteuid():
        raise Missing("no Docker daemon answers, and to start one takes root and dockerd")
    return program


@pytest.fixture(scope="session")
def daemon() -> Iterator[None]:
    program = required(dockerd)
    if program is None:
        yield
        return
    home = CACHE / "docker"
    home.mkdir(parents=True, exist_ok=True)
    places = ["--data-root", str(home / "data"), "--exec-root", str(home / "exec"), "--pidfile", str(home / "pid")]
    # Containers use the machine's own network.
    alone = ["--bridge=none", "--iptables=false", "--ip6tables=false"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([program, *places, *alone], stdout=log, stderr=log, preexec_fn=die_with_parent())
    try:
        deadline = time.monotonic() + 60
        while not answers():
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-2000:]  # noqa: PT018
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def bases(daemon: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The base images: pulled, or made."""
    for name, make in ((PYTHON, _python), (SDK, _sdk)):
        if docker("images", "--quiet", name):
            continue
        if subprocess.run(["docker", "pull", "--quiet", name], capture_output=True, check=False).returncode:
            required(partial(make, tmp_path_factory.mktemp("base")))
            print(f"{name}: made here, as it cannot be pulled")


def _python(folder: Path) -> None:
    """Debian's Python with pip under the names that Python's own image has."""
    if shutil.which("debootstrap") is None:
        raise Missing("the base images can neither be pulled nor, without debootstrap, be made")
    root, sources = folder / "root", call(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)"])
    mirror = next(line.split()[0] for line in sources.splitlines() if line.endswith(" bookworm"))
    packages = "python3,python3-pip,python3-venv,ca-certificates"
    call(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root), mirror])
    next((root / "usr/lib/python3.11").glob("EXTERNALLY-MANAGED")).unlink()
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    (root / "usr/local/bin/pip").symlink_to("/usr/bin/pip3")
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    archive = folder / "root.tar"
    call(["tar", "--create", "--file", str(archive), "--directory", str(root), "."])
    given = {name: os.environ[name] for name in TRUST if name in os.environ}
    changes = [word for name, value in given.items() for word in ("--change", f"ENV {name}={value}")]
    docker("import", *changes, str(archive), PYTHON)


def _sdk(folder: Path) -> None:
    shutil.copy(go_install("python/container"), folder / "boot")
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY boot /opt/apache/beam/boot\n")
    docker("build", "--tag", SDK, str(folder))


def build(template: str, tmp_path: Path) -> str:
    """The name of an image, built from the checkout as its template says."""
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(LAUNCHER.sub("", (CHECKOUT / f"templates/{template}/Dockerfile").read_text()))
    name = f"knn-train-{template}:test"
    print(docker("build", "--network=host", "--file", str(dockerfile), "--tag", name, str(CHECKOUT)).splitlines()[-1])
    size = int(docker("inspect", "--format", "{{.Size}}", name))
    print(f"{name}: {size / 1e6:,.0f} MB on {platform.machine()}")
    return name


@pytest.fixture(scope="session")
def flink_image(bases: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build("flink", tmp_path_factory.mktemp("flink"))


@pytest.fixture
def shared(tmp_path: Path, export: str) -> Path:
    """What a volume is to the containers: a folder with the export, and room for the rest, which all may write to."""
    shared = tmp_path / "shared"
    shutil.copytree(Path(export).parent, shared / "export")
    (shared / "temp").mkdir()
    (shared / "request.json").write_text(json.dumps(REQUEST))
    for path in (shared, shared / "temp"):
        path.chmod(0o777)
    return shared


WORDS = ["--request=/shared/request.json", "--parquet=/shared/export/*.parquet", "--model_dir=/shared/models"]
WORDS += ["--temp_location=/shared/temp", "--model_id=model", "--seed=5"]


def in_container(shared: Path, *words: str) -> str:
    return docker("run", "--rm", "--network=host", f"--volume={shared}:/shared", *words)


def sha256(shared: Path) -> str:
    description = json.loads((shared / "models/model/model.json").read_text())
    assert description["state"] == "created"
    assert list((shared / "temp").iterdir()) == []
    return str(description["provenance"]["blob_sha256"])


def test_kubernetes(bases: None, shared: Path, export: str, tmp_path: Path) -> None:
    """The pod's user, with nothing but its image, trains what is trained here."""
    image = build("kubernetes", tmp_path)
    assert "usage: knn-train" in in_container(shared, image)
    in_container(shared, "--read-only", "--tmpfs=/tmp", image, "knn-train", *WORDS)
    assert (shared / "models/model/model.faiss").stat().st_uid == 65532
    assert sha256(shared) == knn_train(tmp_path / "local", "--parquet", export).checked().blob_sha256


def test_dataflow_without_its_launcher(bases: None, shared: Path, tmp_path: Path) -> None:
    """Builds, and its entry point and its launch program are there."""
    image = build("dataflow", tmp_path)
    assert "usage: knn-train" in in_container(shared, "--entrypoint=knn-train", image, "--help")
    listed = in_container(shared, "--entrypoint=ls", image, "/opt/apache/beam/boot", "/opt/knn-train/launch.py")
    assert listed.splitlines() == ["/opt/apache/beam/boot", "/opt/knn-train/launch.py"]


def test_flink_with_pools_of_workers_in_containers(flink_image: str, shared: Path, export: str, tmp_path: Path) -> None:
    """As the template has it: submitter and pool are the same image, and share a volume."""
    pool = docker("run", "--detach", "--network=host", f"--volume={shared}:/shared", flink_image, "--worker_pool")
    try:
        with closing(FlinkCluster(1)) as cluster:
            cluster.start()
            external = ["--environment_type=EXTERNAL", "--environment_config=localhost:50000", "--parallelism=1"]
            submit = [*WORDS, "--runner=PortableRunner", cluster.job_endpoint, *external]
            print(in_container(shared, "--entrypoint=knn-train", flink_image, *submit))
    finally:
        docker("rm", "--force", pool)
    assert sha256(shared) == knn_train(tmp_path / "local", "--parquet", export).checked().blob_sha256


def test_flink_with_docker_environments(flink_image: str, export: str, tmp_path: Path) -> None:
    """Containers that Flink starts have no volume: what they share is an object store."""
    expected = knn_train(tmp_path / "local", "--parquet", export).checked()
    with object_store(tmp_path / "store.log") as store, closing(FlinkCluster(1)) as cluster:
        cluster.start()
        store.put("export", export)
        docker_ = ["--environment_type=DOCKER", f"--environment_config={flink_image}", "--parallelism=1"]
        ran = train(tmp_path, *store.flags, "--runner=PortableRunner", cluster.job_endpoint, *docker_)
        assert ran.returncode == 0, ran.stderr
        print(ran.stdout)
        description = json.loads(store.read("models/model/model.json"))
        assert store.list("temp") == []
    assert description["provenance"]["blob_sha256"] == expected.blob_sha256
