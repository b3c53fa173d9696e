# SPDX-License-Identifier: Apache-2.0
"""The test server itself: is it what the other tests take it for?"""

from __future__ import annotations

from tests.opensearch_server import OpenSearchServer


def test_runs_the_version_it_says_with_the_knn_plugin(opensearch: OpenSearchServer) -> None:
    client = opensearch.client()
    assert client.info()["version"]["number"] == opensearch.version
    assert "opensearch-knn" in {plugin["component"] for plugin in client.cat.plugins(format="json")}


def test_keeps_address_and_documents_over_a_restart(opensearch_3: OpenSearchServer) -> None:
    client = opensearch_3.client()
    url, pid = opensearch_3.url, opensearch_3.pid
    client.index(index="kept", id="1", body={"colour": "green"}, refresh=True)
    try:
        opensearch_3.restart()
        assert opensearch_3.url == url and opensearch_3.pid != pid
        assert client.get(index="kept", id="1")["_source"] == {"colour": "green"}
    finally:
        client.indices.delete(index="kept")
