# SPDX-License-Identifier: Apache-2.0
"""Prism, Beam's local runner in Go. Beam would download it from a release page; here Go builds it, in four minutes."""

from __future__ import annotations

from pathlib import Path

from tests.runners import go_install


def prism() -> Path:
    """The binary."""
    return go_install("go/cmd/prism")


def options() -> list[str]:
    """What to tell `knn-train` so that it runs there."""
    return ["--runner=PrismRunner", f"--prism_location={prism()}"]
