# SPDX-License-Identifier: Apache-2.0
"""What reaches a Beam worker: the sdist that --setup_file builds, and the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipelines", "transforms")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sdist and wheel from a copy of the sources: an old egg-info in the checkout would hide a missing package."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests", "templates"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def test_wheel_holds_every_module_and_no_other_package(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if name.endswith(".py")} == modules()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)


def test_sdist_is_named_as_beam_stages_it_and_holds_every_module(built: Path) -> None:
    sdist = next(built.glob("*.tar.gz"))
    assert re.fullmatch(r"opensearch_knn_train-[\d.]+\.tar\.gz", sdist.name)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules() <= names


def test_console_scripts(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        scripts = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        text = wheel.read(scripts).decode()
    assert "knn-train = pipelines.train:main" in text
    assert "knn-models = pipelines.models:main" in text


def test_versions_are_exact_where_the_commands_install_from() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    assert all(re.match(r"[\w.-]+(\[.+\])?==[\w.!+-]+( ; .+)?$", line) for line in lines if line)


def test_no_registry_is_named_anywhere() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    hosts = re.compile("|".join(["py" + r"pi\.org", "python" + "hosted", r"maven\.org", "proxy" + r"\.golang"]))
    found = [
        name for name in listed.stdout.split("\n") if name and hosts.search((ROOT / name).read_text(errors="ignore"))
    ]
    assert found == []
