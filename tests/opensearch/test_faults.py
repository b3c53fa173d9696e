# SPDX-License-Identifier: Apache-2.0
"""Servers and networks that fail: what is read stays exact, or the run ends with one line. Nothing is left open."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from tests.opensearch.support import (
    Proxy,
    assert_no_contexts,
    fill,
    knn_vector,
    open_contexts,
    read,
    refuse,
    same_rows,
    source,
    vectors,
)
from transforms.errors import RequestError, TrainingError
from transforms.opensearch import OpenSearchConnection, session
from transforms.opensearch.session import ServerError, Session
from transforms.vectors import RejectedVector

MATRIX = vectors(400, 8)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(session, "_FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def index(opensearch):
    fill(opensearch, "faulty", MATRIX, shards=2)
    return opensearch


def failing(kind, times, path_part="/_search?"):
    """A rule: the second request for a page, and the next ones, `times` in all, go wrong."""
    seen = {"pages": 0, "failed": 0}

    def rule(method, path, body):
        if method == "POST" and path.startswith(path_part):
            seen["pages"] += 1
            if seen["pages"] > 1 and seen["failed"] < times:
                seen["failed"] += 1
                return kind
        return None

    return rule


def break_a_shard(answer):
    """A page as the server would send it had one shard failed."""
    healthy, failed = b"\x66failed\x00", b"\x66failed\x01"
    assert healthy in answer
    return answer.replace(healthy, failed, 1)


@pytest.mark.parametrize("kind", [429, 502, 503, 504, "reset", "partial", break_a_shard])
def test_a_page_that_fails_is_asked_for_again(index, kind):
    expected, _ = read(source(index, "faulty", 8))
    with Proxy(index.url) as proxy:
        source_ = source(index, "faulty", 8, url=proxy.url, search_size=50)
        parts = source_.slices()
        proxy.rule = failing(kind, 2)
        found = np.concatenate([block.priorities for part in parts for block in source_.read(part, 1.0, refuse)])
    assert np.array_equal(np.sort(found), expected)
    assert_no_contexts(index)


def test_a_server_that_does_not_answer_in_time(index):
    with Proxy(index.url) as proxy:
        connection = OpenSearchConnection(proxy.url, timeout_s=1)
        source_ = source(index, "faulty", 8, search_size=50)
        object.__setattr__(source_, "connection", connection)
        parts = source_.slices()
        proxy.rule = failing("hang", 1)
        assert same_rows(np.concatenate([b.vectors for p in parts for b in source_.read(p, 1.0, refuse)]), MATRIX)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (503, r"answers 503 injected: by the test \(10 tries\)$"),
        ("reset", r"cannot be reached: the connection was cut.* \(10 tries\)$"),
        (break_a_shard, r"sent an unusable answer: 1 of 1 shards failed: .* \(10 tries\)$"),
    ],
)
def test_failures_that_last_end_the_read_and_never_shorten_it(index, kind, message):
    with Proxy(index.url) as proxy:
        source_ = source(index, "faulty", 8, url=proxy.url, search_size=50)
        part = source_.slices()[0]
        proxy.rule = failing(kind, 1000)
        with pytest.raises(TrainingError, match=message):
            list(source_.read(part, 1.0, refuse))
        assert len(proxy.requests("DELETE")) == 0
    assert_no_contexts(index)


def test_retries_are_counted_and_heed_retry_after(index):
    left = [3]

    def rule(method, path, body):
        left[0] -= 1
        return (429, {"retry-after": "1"}) if left[0] == 1 else 503 if left[0] == 2 else None

    with Proxy(index.url, rule) as proxy, Session(OpenSearchConnection(proxy.url)) as opened:
        started = time.monotonic()
        assert opened.json("GET", "/")["version"]["number"] == index.version
        assert time.monotonic() - started >= 1
        assert (opened.stats.requests, opened.stats.retried, len(opened.stats.request_msec)) == (1, 2, 1)
        assert opened.stats.bytes_received > 100


def test_what_will_not_mend_is_not_tried_again(index):
    with Proxy(index.url, lambda *_: 400) as proxy, Session(OpenSearchConnection(proxy.url)) as opened:
        with pytest.raises(ServerError) as found:
            opened.send("GET", "/")
        assert len(proxy.seen) == 1
        assert isinstance(opened.explain(found.value), RequestError)


def test_a_context_lost_while_reading_is_replaced_without_loss_or_repeats(index):
    source_ = source(index, "faulty", 8, search_size=30)
    expected, _ = read(source_)
    client = index.client()
    found = []
    lost = 0
    for part in source_.slices():
        for block in source_.read(part, 1.0, refuse):
            found.append(block.priorities)
            # 2.19 answers 400 when the last context goes while it lists them.
            answer = client.transport.perform_request(
                "DELETE", "/_search/point_in_time/_all", params={"ignore": (400, 404)}
            )
            lost += len(answer.get("pits", []))
    assert lost >= 3
    found = np.concatenate(found)
    assert len(found) == len(MATRIX)
    assert np.array_equal(np.sort(found), expected)
    assert_no_contexts(index)


def test_a_restart_while_reading(opensearch_3, monkeypatch):
    monkeypatch.setattr(session, "_FIRST_WAIT_S", 0.25)
    fill(opensearch_3, "restarted", MATRIX)
    source_ = source(opensearch_3, "restarted", 8, search_size=100)
    found = []
    for part in source_.slices():
        for block in source_.read(part, 1.0, refuse):
            if not found:
                opensearch_3.restart()
            found.append(block.vectors)
    assert same_rows(np.concatenate(found), MATRIX)
    assert_no_contexts(opensearch_3)


def test_contexts_are_closed_however_a_read_ends(index):
    source_ = source(index, "faulty", 8, search_size=20)
    part = source_.slices()[0]
    for end in ("close", "drop", KeyboardInterrupt, RuntimeError):
        blocks = source_.read(part, 1.0, refuse)
        next(blocks)
        assert open_contexts(index.client()) > 0
        if end == "close":
            blocks.close()
        elif end == "drop":
            del blocks
        else:
            with pytest.raises(end):
                blocks.throw(end())
        assert_no_contexts(index)


def test_bad_vectors_are_reported_with_their_place(index, monkeypatch):
    """The mapping makes bad vectors impossible, so a proxy spoils one in a page."""
    spoiled = MATRIX[7].tobytes()

    def rule(method, path, body):
        if path.startswith("/_search?"):
            return lambda answer: answer.replace(spoiled, np.full(8, np.nan, "<f4").tobytes())
        return None

    with Proxy(index.url) as proxy:
        source_ = source(index, "faulty", 8, url=proxy.url, search_size=100)
        source_.slices()
        proxy.rule = rule
        bad: list[RejectedVector] = []
        _, found = read(source_, reject=bad.append)
    assert same_rows(found, np.delete(MATRIX, 7, axis=0))
    assert [(one.source, one.reason) for one in bad] == [("faulty", "holds NaN or infinity")]
    assert "_seq_no" in bad[0].row

    def stop(one):
        raise TrainingError(one.reason)

    with Proxy(index.url, rule) as proxy, pytest.raises(TrainingError, match="NaN"):
        read(source(index, "faulty", 8, url=proxy.url, search_size=100), reject=stop)
    assert_no_contexts(index)


def test_without_points_in_time_the_same_is_read(index):
    expected, rows = read(source(index, "faulty", 8))

    def rule(method, path, body):
        return 403 if "point_in_time" in path else None

    with Proxy(index.url, rule) as proxy:
        found, same = read(source(index, "faulty", 8, url=proxy.url, search_size=30, slices_wanted=5))
        # One refusal a slice is enough.
        assert len(proxy.requests("point_in_time")) <= 6
        pages = [json.loads(body) for _, path, body in proxy.requests("/faulty/_search?")]
        assert pages
        assert not any("pit" in page for page in pages)
    assert np.array_equal(found, expected)
    assert np.array_equal(same, rows)


def test_a_node_that_opens_no_more_points_in_time_is_read_at_once(index):
    expected, _ = read(source(index, "faulty", 8))
    client = index.client()
    limit = "search.max_open_pit_context"
    client.cluster.put_settings(body={"transient": {limit: 0}})
    try:
        with Proxy(index.url) as proxy:
            found, _ = read(source(index, "faulty", 8, url=proxy.url, slices_wanted=5))
            assert 0 < len(proxy.requests("point_in_time")) <= 6  # one refusal a slice
            assert not any(b'"pit"' in body for _, _, body in proxy.requests("_search?"))
        assert np.array_equal(found, expected)
    finally:
        client.cluster.put_settings(body={"transient": {limit: None}})


def test_where_scripts_are_refused_source_is_read(index):
    def rule(method, path, body):
        return 400 if b"script_fields" in body else None

    with Proxy(index.url, rule) as proxy:
        source_ = source(index, "faulty", 8, url=proxy.url)
        assert source_.summary().reader == "source"
        assert same_rows(read(source_)[1], MATRIX)
        with pytest.raises(RequestError, match=r'cannot read the vectors of "vec" .* script: by the test'):
            source(index, "faulty", 8, url=proxy.url, reader="script").slices()


def test_an_index_deleted_while_reading_is_a_clear_error(opensearch):
    fill(opensearch, "short-lived", MATRIX[:100])
    source_ = source(opensearch, "short-lived", 8, search_size=10)
    blocks = source_.read(source_.slices()[0], 1.0, refuse)
    next(blocks)
    opensearch.client().indices.delete(index="short-lived")
    with pytest.raises((RequestError, TrainingError), match="short-lived"):
        list(blocks)
    assert_no_contexts(opensearch)


def test_a_shard_without_a_copy_ends_the_read_before_it_begins(index):
    # The node may hold one shard of the index; the others are where they would be had their node gone away.
    settings = {"number_of_shards": 3, "number_of_replicas": 0, "routing.allocation.total_shards_per_node": 1}
    body = {"settings": {"index": settings}, "mappings": {"properties": {"vec": knn_vector(8)}}}
    client = index.client()
    client.indices.create(index="thirds", body=body, params={"wait_for_active_shards": 0})
    client.indices.put_alias(index="thirds", name="third")
    groups: list[tuple[int, list]] = []
    while not any(group for _, group in groups):
        groups = [(key, client.search_shards(index="thirds", params={"routing": key})["shards"][0]) for key in range(9)]
    held, key = next((group[0]["shard"], key) for key, group in groups if group)
    for row in MATRIX[:9]:
        client.index(index="thirds", body={"vec": row.tolist()}, params={"routing": key, "refresh": "true"})
    try:
        first, second = sorted({0, 1, 2} - {held})
        told = f'Index "thirds" has no active copy of shards {first}, {second}: vectors would be missing'
        for expression in ("thirds", "thirds,faulty", "thir*", "third"):
            with pytest.raises(TrainingError, match=told):
                source(index, expression, 8).slices()
    finally:
        client.indices.delete(index="thirds")


def test_no_one_listens():
    with pytest.raises(
        TrainingError, match=r"^OpenSearch at http://127.0.0.1:9 cannot be reached: connection refused \(3 tries\)$"
    ):
        source(None, "any", 8, url="http://127.0.0.1:9").summary()
    with pytest.raises(TrainingError, match=r"cannot be reached: .*(name|resol)"):
        source(None, "any", 8, url="http://no-such-host.invalid:9200").summary()
