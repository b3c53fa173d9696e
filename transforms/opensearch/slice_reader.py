# SPDX-License-Identifier: Apache-2.0
"""`SliceReader`: the pages of one slice, a range of `_seq_no` in one shard.

A slice is read in windows of `_seq_no`, each one search that costs the cluster as much as the window holds, never as
much as the shard. Windows do not depend on one another, so several are in flight at one time. Any page can be asked for
again, which makes retries exact; a point in time keeps the view of the shard still meanwhile. Where points in time are
not to be had, the same searches run without: documents that are updated during the read may then be left out, but none
is read twice.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transforms.opensearch.decoding import Page
from transforms.opensearch.pages import Draw, Reader, as_filters, make_reader, page_body
from transforms.opensearch.planning import Slice, path_of
from transforms.opensearch.session import ATTEMPTS, ServerError, Session
from transforms.opensearch.throttle import Pace, Throttle
from transforms.vectors import MAX_BLOCK_BYTES, block_rows

#: How long a point in time outlives its last page.
KEEP_ALIVE = "2m"

#: A window is cut for the sake of others in flight only where it costs the cluster more than a request does.
_SMALLEST_WINDOW = 250_000

#: Bytes of a page that is larger than was meant: the next ones get fewer rows.
_LARGE_PAGE = 2 * MAX_BLOCK_BYTES


@dataclass(frozen=True)
class _Window:
    """A range of `_seq_no` that `rows` hits were asked of, and the page that is to come."""

    first: int
    last: int
    rows: int
    page: Future[Page]


class SliceReader:
    """Pages of one slice, in the order of `_seq_no`."""

    def __init__(
        self, session: Session, throttle: Throttle, pace: Pace, part: Slice, query: str, draw: Draw, search_size: int
    ):
        self._session = session
        self._throttle = throttle
        self._pace = pace
        self._part = part
        self._draw = draw
        self._reader: Reader = make_reader(part.reader, part.field)
        self._filters = [part.field.exists(), *as_filters(query, part.alias_filter)]
        # Objects of a nested field have priorities of their own, which the cluster cannot compute.
        self._thin = part.field.nested is None
        self._most_rows = min(search_size, _page_rows(part, self._reader))
        self._lock = threading.Lock()
        self._pit: str | None = None
        self._can_have_pit = True

    def read(self) -> Generator[Page, None, None]:
        """The pages; the next ones are fetched by other threads while the caller works on one."""
        part, span = self._part, self._part.last - self._part.first + 1
        kept = self._draw.limit / 2.0**64 if self._thin else 1.0
        rows = self._most_rows
        width = _width(kept * part.count, span, rows)
        asked: deque[_Window] = deque()
        start = part.first
        pool = ThreadPoolExecutor(self._throttle.limit, thread_name_prefix="page")

        def ask() -> None:
            nonlocal start
            share = self._throttle.share
            while start <= part.last and len(asked) < share:
                end = min(part.last, start + min(width, max(_SMALLEST_WINDOW, math.ceil(span / share))) - 1)
                asked.append(_Window(start, end, rows, pool.submit(self._page, start, end, rows)))
                start = end + 1

        try:
            ask()
            while asked:
                window = asked.popleft()
                page = window.page.result()
                rows = self._fitting(page, window.rows)
                end = window.last
                if page.hits >= window.rows and page.last < end:
                    # It held more than a page: what is left comes next.
                    end = page.last
                    rest = pool.submit(self._page, end + 1, window.last, rows)
                    asked.appendleft(_Window(end + 1, window.last, rows, rest))
                # Windows are as wide as one page was here, but grow no faster than fourfold over empty stretches.
                read = end - window.first + 1
                width = min(4 * max(width, read), _width(page.hits, read, rows))
                ask()
                yield page
        finally:
            self._session.cancel()
            pool.shutdown(cancel_futures=True)
            self._close()

    def _fitting(self, page: Page, rows: int) -> int:
        """Rows to ask for after `page`, which `rows` were asked of, so that pages stay near MAX_BLOCK_BYTES."""
        if page.size > _LARGE_PAGE:
            return max(1, page.hits * MAX_BLOCK_BYTES // page.size)
        return min(self._most_rows, 2 * rows) if page.size < MAX_BLOCK_BYTES // 2 else rows

    def _page(self, first: int, last: int, rows: int) -> Page:
        window = {"range": {"_seq_no": {"gte": first, "lte": last}}}
        body = page_body(self._draw.query([*self._filters, window], self._thin), self._reader, rows)
        for _ in range(ATTEMPTS):
            pit = self._open()
            try:
                return self._search(body, pit)
            except ServerError as error:
                # An expired or lost context: nothing before `first` is needed again, so a new one goes on from here.
                if pit is None or not _is_lost_context(error):
                    raise
                self._lost(pit)
        return self._search(body, self._open())

    def _search(self, body: dict[str, Any], pit: str | None) -> Page:
        params = {"allow_partial_search_results": "false"}
        path = "/_search"
        if pit is not None:
            body = {**body, "pit": {"id": pit, "keep_alive": KEEP_ALIVE}}
        else:
            path = f"/{path_of(self._part.index)}/_search"
            # The same copy of the shard for all pages: another one may not have refreshed as far.
            params["preference"] = f"_shards:{self._part.shard}|_primary_first"

        def decode(data: bytes) -> Page:
            page = self._reader.decode(data)
            page.size = len(data)
            return page

        self._pace.wait(self._session)
        page: Page = self._session.send("POST", path, params, body, accept=self._reader.accept, check=decode)
        if page.pit_id:
            with self._lock:
                if self._pit == pit:
                    self._pit = page.pit_id
        return page

    def _open(self) -> str | None:
        """The point in time that all threads share, None where there are none."""
        with self._lock:
            if self._pit is not None or not self._can_have_pit:
                return self._pit
            params = {
                "keep_alive": KEEP_ALIVE,
                "preference": f"_shards:{self._part.shard}",
                "allow_partial_pit_creation": "false",
            }
            try:
                path = f"/{path_of(self._part.index)}/_search/point_in_time"
                self._pit = self._session.json("POST", path, params)["pit_id"]
            except ServerError as error:
                # Not permitted, not known to this version, or too many open ones.
                if error.status not in (400, 403, 405, 429):
                    raise
                self._can_have_pit = False
            return self._pit

    def _lost(self, pit: str) -> None:
        with self._lock:
            if self._pit == pit:
                self._pit = None
                self._session.count_retry()

    def _close(self) -> None:
        pit, self._pit = self._pit, None
        if pit is None:
            return
        # It expires by itself, and must not hide the error that ended the read.
        with suppress(Exception):
            self._session.send("DELETE", "/_search/point_in_time", body={"pit_id": [pit]}, attempts=2)


def _width(hits: float, span: int, rows: int) -> int:
    """How many `_seq_no`s hold a page of `rows`, where `span` of them hold `hits`.

    Three standard deviations fewer are meant, since what does not fit a page costs another request. As many `_seq_no`s
    as rows always fit.
    """
    meant = max(rows / 2, rows - 3 * math.sqrt(rows))
    return max(rows, math.ceil(span * meant / max(hits, 1e-9)))


def _page_rows(part: Slice, reader: Reader) -> int:
    """Rows of a page: one block, about 4 MB, which is where bigger pages stop being faster. JSON takes more bytes."""
    rows = block_rows(part.field.columns * part.field.dtype.itemsize)
    return max(1, int(rows / (4 * part.objects))) if reader.name == "source" else rows


def _is_lost_context(error: ServerError) -> bool:
    return error.status == 404 or "search_context_missing" in error.type
