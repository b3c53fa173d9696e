# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several tests share. A server starts when a test first asks for it and lives as long as the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TypeVar

import pytest

from tests.opensearch_home import Missing
from tests.opensearch_security import SecureOpenSearchServer
from tests.opensearch_server import OpenSearchServer
from tests.runners.job import vectors, write_export

Server = TypeVar("Server", bound=OpenSearchServer)


@pytest.fixture(scope="session")
def opensearch_3() -> Iterator[OpenSearchServer]:
    yield from _served(lambda: OpenSearchServer("3.6.0"))


@pytest.fixture(scope="session")
def opensearch_2() -> Iterator[OpenSearchServer]:
    yield from _served(lambda: OpenSearchServer("2.19.1"))


@pytest.fixture(scope="session", params=["opensearch_3", "opensearch_2"])
def opensearch(request: pytest.FixtureRequest) -> OpenSearchServer:
    """Both versions, one after the other."""
    server: OpenSearchServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture(scope="session")
def opensearch_secure() -> Iterator[SecureOpenSearchServer]:
    """2.19.1 with TLS and users; for 3.x the security plugin is not published."""
    yield from _served(SecureOpenSearchServer)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Parquet files of the job that every runner is given; nobody changes them."""
    return write_export(tmp_path_factory.mktemp("job") / "export", vectors())


def _served(make: Callable[[], Server]) -> Iterator[Server]:
    try:
        server = make()
    except Missing as missing:
        # A developer may lack a JDK; a CI run that skips these tests would show nothing.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(missing))
    with closing(server):
        server.start()
        yield server
