# SPDX-License-Identifier: Apache-2.0
"""Runners other than the one in this process: how they are built, and one job that is the same for all of them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apache_beam as beam
import pytest

from tests.opensearch_home import Missing

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache"

T = TypeVar("T")


def required(make: Callable[[], T]) -> T:
    """What `make` returns; without the tools it takes, the test is skipped by a developer and fails in CI."""
    try:
        return make()
    except Missing as missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(missing))


def once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build` the first time. Safe to call concurrently; what a killed build left is redone."""
    complete = folder / ".complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            complete.touch()
    return folder


def go_install(package: str) -> Path:
    """The program that `package` of Beam's Go module builds, in the version of the Python package."""

    def build(folder: Path) -> None:
        if shutil.which("go") is None:
            raise Missing("go is not on PATH")
        module = f"github.com/apache/beam/sdks/v2/{package}@v{beam.__version__}"
        call(["go", "install", module], env={**os.environ, "GOBIN": str(folder)})

    name = package.rpartition("/")[2]
    return once(CACHE / f"{name}-{beam.__version__}", build) / name


def call(command: list[str], **options: object) -> str:
    """Runs a command that fetches or builds, and returns what it printed; raises Missing if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if done.returncode:
        raise Missing(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return done.stdout
