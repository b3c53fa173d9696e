# SPDX-License-Identifier: Apache-2.0
"""What the templates are tried in: the images' Python environment, Airflow, and the schemas of whoever reads them.

All of it is kept under .cache, and made again when what it follows from has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

from tests.opensearch_home import Missing
from tests.runners import CACHE, CHECKOUT, call, once

TEMPLATES = CHECKOUT / "templates"
DOCKERFILES = sorted(TEMPLATES.glob("*/Dockerfile"))

AIRFLOW = ("apache-airflow-core==3.3.2", "apache-airflow-providers-standard==1.21.0")
GOOGLE_APIS = "google-api-python-client==2.202.0"
FLINK_OPERATOR = "1.10.0"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of the last stage."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]
    last = max(number for number, (name, _) in enumerate(found) if name == "FROM")
    return [(name, rest) for name, rest in found[last:]]


def install_steps(dockerfile: Path) -> list[tuple[str, str]]:
    """What of an image can be done without one: COPY from the checkout, and RUN of pip."""
    return [
        (name, rest)
        for name, rest in instructions(dockerfile)
        if (name == "RUN" and rest.startswith("pip ")) or (name == "COPY" and not rest.startswith("--from"))
    ]


def image_python() -> Path:
    """The `python` of an environment that the images' install steps made, with Beam YAML beside them.

    This package is taken out again: it is imported from the checkout (`checkout_environment`).
    """
    steps = install_steps(DOCKERFILES[0])
    key = _digest((CHECKOUT / ".ci/constraints.txt").read_text(), (CHECKOUT / "pyproject.toml").read_text(), *steps)

    def build(folder: Path) -> None:
        call([sys.executable, "-m", "venv", str(folder / "venv")])
        path = f"{folder / 'venv/bin'}:{os.environ['PATH']}"
        with tempfile.TemporaryDirectory() as workdir:
            for name, rest in steps:
                if name == "COPY":
                    _copy(rest, Path(workdir))
                else:
                    # Layers must not hold the cache of downloads; this machine may.
                    command = rest.replace("--no-cache-dir ", "")
                    call(["sh", "-c", command], cwd=workdir, env={**_QUICK, "PATH": path})
        pip = [str(folder / "venv/bin/python"), "-m", "pip", "--quiet"]
        constraints = ["--constraint", str(CHECKOUT / ".ci/constraints.txt")]
        call([*pip, "install", *constraints, "apache-beam[yaml]"], env=_QUICK)
        call([*pip, "uninstall", "--yes", "opensearch-knn-train"])

    return once(CACHE / f"image-{key}", build) / "venv/bin/python"


def airflow_python() -> Path:
    """The `python` of an Airflow."""

    def build(folder: Path) -> None:
        call([sys.executable, "-m", "venv", str(folder / "venv")])
        call([str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", *AIRFLOW], env=_QUICK)

    return once(CACHE / f"airflow-{_digest(*AIRFLOW)}", build) / "venv/bin/python"


def checkout_environment(**more: str) -> dict[str, str]:
    """Variables for a `python` that is to import this checkout."""
    return {**_clean_environment(), "PYTHONPATH": str(CHECKOUT), **more}


def google_schema(api: str, name: str) -> dict[str, Any]:
    """A JSON schema of one of Google's APIs, which their client package holds; unknown fields are refused."""

    def build(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), GOOGLE_APIS]
        call(pip)

    wheel = next(once(CACHE / f"google-apis-{_digest(GOOGLE_APIS)}", build).glob("*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        document = json.loads(packed.read(f"googleapiclient/discovery_cache/documents/{api}.json"))
    return {"$defs": {key: _strict(value) for key, value in document["schemas"].items()}, "$ref": f"#/$defs/{name}"}


def flink_schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a custom resource, from the Flink operator itself."""
    artifact = f"org.apache.flink:flink-kubernetes-operator-api:{FLINK_OPERATOR}"

    def build(folder: Path) -> None:
        if shutil.which("mvn") is None:
            raise Missing("mvn is not on PATH")
        call(["mvn", "-q", "dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"])

    jar = next(once(CACHE / f"flink-operator-{FLINK_OPERATOR}", build).glob("*.jar"))
    with zipfile.ZipFile(jar) as packed:
        text = packed.read(f"META-INF/fabric8/{kind.lower()}s.flink.apache.org-v1.yml")
    crd = yaml.load(text, Loader=yaml.CSafeLoader)
    return dict(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A discovery document's schema in the words of JSON Schema: no unknown fields, and references that resolve."""
    found = {key: value for key, value in schema.items() if key in ("type", "properties", "items", "enum", "$ref")}
    if "$ref" in found:
        return {"$ref": f"#/$defs/{found['$ref']}"}
    if found.get("type") == "any":
        return {}
    if "properties" in found:
        found["properties"] = {key: _strict(value) for key, value in found["properties"].items()}
        found["additionalProperties"] = False
    if "items" in found:
        found["items"] = _strict(found["items"])
    return found


def _copy(arguments: str, workdir: Path) -> None:
    *sources, target = shlex.split(arguments)
    for source in sources:
        path = CHECKOUT / source
        if path.is_dir():
            shutil.copytree(path, workdir / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, workdir / target)


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENSEARCH_"))}


#: pip compiles all that it installs, most of which is never imported.
_QUICK = {**_clean_environment(), "PIP_NO_COMPILE": "1"}


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, five minutes at most."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
