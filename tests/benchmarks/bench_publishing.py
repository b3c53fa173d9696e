# SPDX-License-Identifier: Apache-2.0
"""Every route for every kind of model into real clusters: what came of it.

    python -m tests.benchmarks.bench_publishing [--versions 3.6.0 2.19.1]

Prints the table of `PUBLISHING.md`. Each model is published, read back and compared, verified and deleted.
"""

from __future__ import annotations

import argparse
from contextlib import closing

from tests.opensearch_server import OpenSearchServer
from tests.publish_cases import CASES
from transforms.errors import RequestError
from transforms.opensearch import OpenSearchConnection, Session, model_index, temporary_index
from transforms.opensearch.publishing import publish
from transforms.opensearch.routes import DELEGATE, REPLAY, SWAP


def cell(session: Session, name: str, version: str, route: str) -> str:
    case = CASES[name]
    request = case.request(version)
    model = case.model(request)
    try:
        result = publish(session, model, request, case.vectors, route)
    except RequestError:
        return "refused"
    assert result.warnings == ()
    assert temporary_index.find(session) == []
    model_index.delete_model(session, model.model_id)
    return "its own" if route == DELEGATE else "exact" if result.exact else "rounded"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--versions", nargs="+", default=["3.6.0", "2.19.1"])
    given = parser.parse_args()
    routes = (REPLAY, SWAP, DELEGATE)
    found: dict[str, list[str]] = {name: [] for name in CASES}
    for version in given.versions:
        with closing(OpenSearchServer(version)) as server:
            server.start()
            with Session(OpenSearchConnection(server.url)) as session:
                for name in CASES:
                    found[name] += [cell(session, name, version, route) for route in routes]
    print("|", *(f"| {version} {route}" for version in given.versions for route in routes), "|")
    print("| --- " * (1 + 3 * len(given.versions)) + "|")
    for name, cells in found.items():
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
