# SPDX-License-Identifier: Apache-2.0
"""Reading as gently as a cluster needs it, with the same result."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from tests.opensearch.support import (
    Proxy,
    assert_no_contexts,
    create,
    fill,
    knn_vector,
    put,
    read,
    refuse,
    same_rows,
    source,
    vectors,
)
from tests.opensearch_server import OpenSearchServer
from transforms.errors import RequestError
from transforms.opensearch import OpenSearchConnection, session, throttle
from transforms.opensearch.session import Session
from transforms.opensearch.throttle import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Throttle

MATRIX = vectors(2000, 8)


@pytest.fixture(scope="module")
def index(opensearch_3):
    fill(opensearch_3, "throttled", MATRIX)
    return opensearch_3


@pytest.fixture(scope="module")
def narrow():
    """A node with one search thread and room for two more searches to wait: real refusals are easily had."""
    settings = {"thread_pool.search.size": 1, "thread_pool.search.queue_size": 2}
    with closing(OpenSearchServer("3.6.0", settings=settings)) as server:
        server.start()
        fill(server, "throttled", MATRIX)
        yield server


class CountingProxy(Proxy):
    """Remembers the most pages that were in flight at one time, and the largest answer."""

    most = largest = _now = 0

    def _forward(self, handler, body):
        page = handler.path.startswith("/_search?")
        with self._lock:
            self._now += page
            self.most = max(self.most, self._now)
        try:
            answer = super()._forward(handler, body)
        finally:
            with self._lock:
                self._now -= page
        self.largest = max(self.largest, len(answer[2]))
        return answer


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_in_flight_than_allowed_in_one_process(index, limit):
    expected, rows = read(source(index, "throttled", 8))
    with CountingProxy(index.url) as proxy:
        source_ = source(
            index, "throttled", 8, url=proxy.url, search_size=50, slices_wanted=4, max_requests_in_flight=limit
        )
        # As a runner does that works on several slices at once.
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda part: list(source_.read(part, 1.0, refuse)), source_.slices()))
        assert proxy.most == limit
    priorities = np.concatenate([block.priorities for blocks in found for block in blocks])
    order = np.argsort(priorities)
    assert np.array_equal(priorities[order], expected)
    assert same_rows(np.concatenate([block.vectors for blocks in found for block in blocks]), rows)
    assert_no_contexts(index)


def test_a_slice_alone_uses_all_that_is_allowed(index):
    expected, _ = read(source(index, "throttled", 8))
    with CountingProxy(index.url) as proxy:
        source_ = source(
            index, "throttled", 8, url=proxy.url, search_size=50, slices_wanted=1, max_requests_in_flight=4
        )
        (part,) = source_.slices()
        blocks = list(source_.read(part, 1.0, refuse))
        assert 1 < proxy.most <= 4
    # Blocks come in the order of `_seq_no`, however the pages came.
    assert same_rows(np.concatenate([block.vectors for block in blocks]), MATRIX)
    assert np.array_equal(np.sort(np.concatenate([block.priorities for block in blocks])), expected)
    one = [
        block
        for block in source(index, "throttled", 8, search_size=50, slices_wanted=1, max_requests_in_flight=1).read(
            part, 1.0, refuse
        )
    ]
    assert np.array_equal(np.concatenate([b.vectors for b in one]), np.concatenate([b.vectors for b in blocks]))


@pytest.mark.parametrize("limit", [0, 65])
def test_limits_of_the_limit(limit):
    with pytest.raises(RequestError, match=rf"max_requests_in_flight is {limit}, expected 1 to 64"):
        source(None, "any", 8, url="http://localhost:9", max_requests_in_flight=limit)


def test_real_refusals_are_waited_out(narrow, monkeypatch):
    expected, _ = read(source(narrow, "throttled", 8, max_requests_in_flight=1))
    monkeypatch.setattr(session, "_FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(throttle, "SHORTEST_PAUSE_S", 0.01)
    monkeypatch.setattr(throttle, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(throttle, "LOOK_EVERY_S", 0.2)
    opened = opened_sessions(monkeypatch)
    found, _ = read(source(narrow, "throttled", 8, search_size=50, max_requests_in_flight=32))
    assert np.array_equal(found, expected)
    assert sum(one.stats.retried for one in opened) > 0
    assert sum(one.stats.paused_msec for one in opened) > 0
    pool = next(iter(narrow.client().nodes.stats(metric="thread_pool")["nodes"].values()))["thread_pool"]["search"]
    assert pool["rejected"] > 0
    assert_no_contexts(narrow)


def test_reading_slows_down_while_searches_of_others_wait(narrow, monkeypatch):
    monkeypatch.setattr(throttle, "LOOK_EVERY_S", 0.05)
    pace = Throttle(1).pace(source(narrow, "throttled", 8).slices()[0].nodes)
    ended = threading.Event()
    slow = {"script": {"source": "double x = 0; for (int i = 0; i < 3000; ++i) { x += Math.sqrt(i); } return x;"}}
    body = {"query": {"script_score": {"query": {"match_all": {}}, **slow}}}

    def hammer():
        while not ended.is_set():
            narrow.client().search(index="throttled", body=body, ignore=(429,))

    others = [threading.Thread(target=hammer) for _ in range(3)]
    with Session(OpenSearchConnection(narrow.url), gate=pace) as opened:
        for thread in others:
            thread.start()
        try:
            deadline = time.monotonic() + 30
            while not opened.stats.paused_msec and time.monotonic() < deadline:
                time.sleep(0.05)
                pace.wait(opened)
            assert opened.stats.paused_msec
        finally:
            ended.set()
            for thread in others:
                thread.join()
        for _ in range(20):
            time.sleep(0.05)
            before = opened.stats.paused_msec
            pace.wait(opened)
            if opened.stats.paused_msec == before:
                return
        raise AssertionError("no queue is left, and it still pauses")


def test_pauses_double_while_the_queue_grows_and_halve_afterwards(index, monkeypatch):
    """The proxy writes the lengths of the queue; the node's own is empty."""
    monkeypatch.setattr(throttle, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(Session, "pause", lambda self, seconds: pauses.append(seconds) or True)
    lengths = iter([0, 3, 5, 5, 4, 0, 7, 0, 0, 0, 0])
    pauses: list[float] = []

    def rule(method, path, body):
        return lambda answer: answer.replace(b'"queue":0', b'"queue":%d' % next(lengths))

    with Proxy(index.url, rule) as proxy, Session(OpenSearchConnection(proxy.url)) as opened:
        pace = Throttle(1).pace(source(index, "throttled", 8).slices()[0].nodes)
        after = []
        for _ in range(11):
            pace.wait(opened)
            after.append(pace._pause / SHORTEST_PAUSE_S)
        assert all(path.startswith("/_nodes/") for _, path, _ in proxy.seen)
    assert after == [0, 1, 2, 4, 2, 1, 2, 1, 0, 0, 0]
    pace = Throttle(1).pace(())
    for _ in range(20):
        pace.refused()
        pace._refused = False
    assert pace._pause == LONGEST_PAUSE_S


def test_where_the_queue_may_not_be_read_nobody_hears_of_it(index, monkeypatch):
    monkeypatch.setattr(throttle, "LOOK_EVERY_S", 0.0)
    with Proxy(index.url, lambda method, path, body: 403 if "/_nodes" in path else None) as proxy:
        _, found = read(source(index, "throttled", 8, url=proxy.url, search_size=100))
        assert same_rows(found, MATRIX)
        assert 1 <= len(proxy.requests("/_nodes/")) <= 4
        assert len(proxy.requests("/_search?")) >= 20


def test_a_look_that_fails_is_no_trouble(index, monkeypatch):
    monkeypatch.setattr(throttle, "LOOK_EVERY_S", 0.0)
    with Proxy(index.url, lambda method, path, body: 503 if "/_nodes" in path else None) as proxy:
        assert same_rows(read(source(index, "throttled", 8, url=proxy.url, search_size=100))[1], MATRIX)


def page_sizes(proxy):
    return [json.loads(body)["size"] for _, path, body in proxy.seen if path.startswith("/_search?")]


def test_pages_of_wide_vectors_stay_small(index):
    """Numbers with all digits of a double, as Python clients write them, are 80 % longer than a float32's."""
    wide = np.random.default_rng(3).standard_normal((500, 1536))
    fill(index, "wide", wide)
    with CountingProxy(index.url) as proxy:
        _, found = read(source(index, "wide", 1536, url=proxy.url, reader="source", slices_wanted=1))
        assert same_rows(found, wide.astype("<f4"))
        assert len(page_sizes(proxy)) >= 3
        assert proxy.largest < 8 << 20


def test_pages_of_documents_with_many_vectors_get_fewer_of_them(index):
    create(index, "many-parts", {"parts": {"type": "nested", "properties": {"vec": knn_vector(64)}}})
    # One vector in each of the first documents, many in the last ones: half of what their pages were meant for.
    parts = [np.random.default_rng(n).standard_normal((count, 64)) for n, count in enumerate([1] * 300 + [110] * 200)]
    put(index, "many-parts", [{"parts": [{"vec": row} for row in each.tolist()]} for each in parts], batch=100)
    with CountingProxy(index.url) as proxy:
        source_ = source(index, "many-parts", 64, "parts.vec", url=proxy.url, slices_wanted=1, max_requests_in_flight=1)
        assert same_rows(read(source_)[1], np.concatenate(parts).astype("<f4"))
        sizes = page_sizes(proxy)
        assert 14_000_000 > proxy.largest > 8 << 20
        assert sizes[0] < 100
        assert sizes[-1] <= sizes[0] // 2


def opened_sessions(monkeypatch):
    from transforms.opensearch import reading

    opened = []

    class Remembered(Session):
        def __init__(self, *rest, **options):
            super().__init__(*rest, **options)
            opened.append(self)

    monkeypatch.setattr(reading, "Session", Remembered)
    return opened
