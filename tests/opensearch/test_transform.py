# SPDX-License-Identifier: Apache-2.0
"""`ReadFromOpenSearch` in a pipeline."""

from __future__ import annotations

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.display import DisplayData

from tests.opensearch.support import Proxy, assert_no_contexts, fill, put, read, same_rows, source, vectors
from transforms.errors import TrainingError
from transforms.opensearch import OpenSearchConnection, ReadFromOpenSearch
from transforms.vectors import VectorBlock

MATRIX = vectors(500, 8)


@pytest.fixture(scope="module")
def index(opensearch):
    fill(opensearch, "piped", MATRIX, shards=2)
    put(opensearch, "piped", [{"other": 1}] * 3)
    return opensearch


def metrics(result):
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace("knn_train"))
    return {
        metric.key.metric.name: metric.committed for kind in ("counters", "distributions") for metric in found[kind]
    }


def test_blocks_and_metrics(index):
    pipeline = beam.Pipeline(runner=FnApiRunner())
    blocks = pipeline | ReadFromOpenSearch(OpenSearchConnection(index.url), "piped", "vec", 8, seed=3, slices=5)
    assert blocks.element_type is VectorBlock
    expected, _ = read(source(index, "piped", 8, seed=3))

    def check(found):
        assert same_rows(np.concatenate([block.vectors for block in found]), MATRIX)
        assert np.array_equal(np.sort(np.concatenate([block.priorities for block in found])), expected)

    assert_that(blocks, check)
    result = pipeline.run()
    result.wait_until_finish()
    counted = metrics(result)
    assert counted["vectors_read"] == 500
    assert counted["slices_done"] == 5
    assert counted["documents_without_vector"] == 3
    assert counted["bytes_received"] > 500 * 32
    # A point in time, a page and a goodbye for each slice, and a look at the node's queue every other second.
    assert 3 * counted["slices_done"] <= counted["requests"] < 4 * counted["slices_done"]
    assert counted["request_msec"].count == counted["requests"]
    assert counted["block_rows"].sum == 500
    assert counted.get("requests_retried", 0) == 0
    assert_no_contexts(index)


def test_bad_vectors_are_a_second_output_where_allowed(index):
    spoiled = np.full(8, np.inf, "<f4").tobytes()

    def rule(method, path, body):
        return (lambda answer: answer.replace(MATRIX[7].tobytes(), spoiled)) if path.startswith("/_search?") else None

    def build(pipeline, allowed):
        connection = OpenSearchConnection(proxy.url)
        return pipeline | ReadFromOpenSearch(connection, "piped", "vec", 8, max_bad_vectors=allowed)

    with Proxy(index.url, rule) as proxy:
        pipeline = beam.Pipeline(runner=FnApiRunner())
        outputs = build(pipeline, 1)
        assert_that(
            outputs.rejected | beam.Map(lambda bad: (bad.source, bad.reason)),
            equal_to([("piped", "holds NaN or infinity")]),
        )
        assert_that(outputs.vectors | beam.Map(len) | beam.CombineGlobally(sum), equal_to([499]), label="vectors")
        pipeline.run().wait_until_finish()
        pipeline = beam.Pipeline(runner=FnApiRunner())
        build(pipeline, 0)
        with pytest.raises(TrainingError, match=r"1 bad vector, 0 allowed .* piped shard \d, _seq_no \d+: holds NaN"):
            pipeline.run()
    assert_no_contexts(index)


def test_display_data_names_the_index_and_no_secret(index):
    connection = OpenSearchConnection(index.url, username="me", password_from="env:PASSWORD")
    transform = ReadFromOpenSearch(connection, "piped", "vec", 8, query={"match_all": {}}, keep=0.5)
    items = {item.key: item.value for item in DisplayData.create_from(transform).items}
    assert items["index"] == "piped"
    assert items["keep"] == 0.5
    assert items["query"] == '{"match_all": {}}'
    assert "password" not in str(items).lower()
