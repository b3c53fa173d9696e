# SPDX-License-Identifier: Apache-2.0
"""`ReadFromOpenSearch`: the vectors of a `knn_vector` field, thinned by the cluster before they travel.

A slice is a range of `_seq_no` in one shard. It is read in windows of `_seq_no`, each one search that costs the cluster
as much as the window holds, never as much as the shard. Any page can be asked for again, which makes retries exact; a
point in time keeps the view of the shard still meanwhile. Where points in time are not to be had, the same searches run
without: documents that are updated during the read may then be left out, but none is read twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from transforms.errors import RequestError
from transforms.opensearch.connection import OpenSearchConnection
from transforms.opensearch.decoding import Page
from transforms.opensearch.pages import READERS, Draw, Reader, VectorField, as_filters, make_reader, page_body
from transforms.opensearch.planning import Plan, Slice, make_plan, path_of
from transforms.opensearch.session import LAUNCHER_ATTEMPTS, RequestStats, ServerError, Session
from transforms.reading import METRICS, ReadVectors
from transforms.vectors import NUMPY_TYPES, RejectedVector, SourceSummary, VectorBlock, block_rows

#: How long a point in time outlives its last page.
KEEP_ALIVE = "2m"

#: The plugin's limit and default of `search_size`.
MAX_SEARCH_SIZE = 10_000

T = TypeVar("T")


@dataclass(frozen=True)
class OpenSearchVectors:
    """A `VectorSource`: the vectors of one field in the indices that an expression names.

    Attributes:
      connection: how to reach the cluster.
      index: index, alias, data stream, wildcard, or several with commas.
      field: dotted path of a `knn_vector`. Of a `nested` parent, each object counts as a vector.
      dimension: as in the mapping, which is checked.
      data_type: float, byte or binary, as in the mapping.
      query: only documents that match this query, e.g. `{"term": {"lang": "en"}}`; all by default.
      seed: decides the priorities.
      search_size: most documents in one response.
      reader: auto, docvalues, script or source; see `pages.READERS`.
      slices: how many parts to read independently; 0 to choose by size.
    """

    connection: OpenSearchConnection
    index: str
    field: str
    dimension: int
    data_type: str = "float"
    query: dict[str, Any] | None = None
    seed: int = 0
    search_size: int = MAX_SEARCH_SIZE
    reader: str = "auto"
    slices_wanted: int = 0

    def __post_init__(self) -> None:
        if self.data_type not in NUMPY_TYPES:
            raise RequestError(f"data type {self.data_type!r} is not one of {', '.join(NUMPY_TYPES)}")
        if not 1 <= self.search_size <= MAX_SEARCH_SIZE:
            raise RequestError(f"Search size {self.search_size} is invalid. Search size must be between 0 and 10,000")
        if self.reader not in ("auto", *READERS):
            raise RequestError(f'reader "{self.reader}" is not one of auto, {", ".join(READERS)}')
        if self.slices_wanted < 0:
            raise RequestError(f"{self.slices_wanted} slices")

    def summary(self) -> SourceSummary:
        plan = self._plan
        return SourceSummary(self.index, plan.reader, plan.vectors, plan.hit_bytes, plan.vectors + plan.without)

    def slices(self) -> Sequence[Slice]:
        return self._plan.slices

    @property
    def documents_without_vector(self) -> int:
        """Documents that match the query but have no vector."""
        return self._plan.without

    def read(self, part: Slice, keep: float, reject: Callable[[RejectedVector], None]) -> Iterator[VectorBlock]:
        draw = Draw(self.seed, keep)
        nested = part.field.nested is not None
        metrics = _ReadMetrics()
        metrics.without.inc(part.documents_without_vector)
        with Session(self.connection) as session:
            pages = _ahead(_SliceReader(session, part, self._query, draw, self.search_size).read())
            try:
                for page in pages:
                    metrics.report(session.stats)
                    for row, reason in page.bad:
                        reject(RejectedVector(part.index, f"shard {part.shard}, _seq_no {row}", reason))
                    priorities = draw.priorities(page, part.index, part.shard, nested)
                    wanted = draw.wanted(priorities)
                    yield from _blocks(priorities[wanted], page.vectors[wanted])
            except ServerError as error:
                raise session.explain(error) from None
            finally:
                session.cancel()
                pages.close()
                metrics.report(session.stats)

    @property
    def _query(self) -> str:
        return json.dumps(self.query) if self.query else ""

    @cached_property
    def _plan(self) -> Plan:
        with Session(self.connection, LAUNCHER_ATTEMPTS) as session:
            return make_plan(
                session,
                self.index,
                self.field,
                self.dimension,
                self.data_type,
                self._query,
                self.reader,
                self.slices_wanted,
            )

    def __getstate__(self) -> dict[str, Any]:
        # The plan stays with the launcher: workers get their slice.
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


@dataclass(eq=False)
class ReadFromOpenSearch(beam.PTransform):
    """`p | ReadFromOpenSearch(connection=…, index=…, field=…, dimension=…)` gives a PCollection of VectorBlock.

    Connects when it is applied, to check the index and plan the slices. With `max_bad_vectors` the result has two
    outputs, `.vectors` and `.rejected`. Attributes are those of `OpenSearchVectors` and `ReadVectors`.
    """

    connection: OpenSearchConnection
    index: str
    field: str
    dimension: int
    data_type: str = "float"
    query: dict[str, Any] | None = None
    seed: int = 0
    search_size: int = MAX_SEARCH_SIZE
    reader: str = "auto"
    slices: int = 0
    keep: float = 1.0
    max_bad_vectors: int = 0

    def source(self) -> OpenSearchVectors:
        return OpenSearchVectors(
            self.connection,
            self.index,
            self.field,
            self.dimension,
            self.data_type,
            self.query,
            self.seed,
            self.search_size,
            self.reader,
            self.slices,
        )

    def expand(self, begin: Any) -> Any:
        outputs = begin | "Read" >> ReadVectors(self.source(), self.keep, self.max_bad_vectors)
        return outputs if self.max_bad_vectors else outputs.vectors

    def display_data(self) -> dict[str, Any]:
        shown = {"url": self.connection.url, "index": self.index, "field": self.field, "dimension": self.dimension}
        shown |= {"data_type": self.data_type, "seed": self.seed, "reader": self.reader, "keep": self.keep}
        if self.query:
            shown["query"] = json.dumps(self.query)
        return shown


class _SliceReader:
    """Pages of one slice, in the order of `_seq_no`."""

    def __init__(self, session: Session, part: Slice, query: str, draw: Draw, search_size: int):
        self._session = session
        self._part = part
        self._draw = draw
        self._reader: Reader = make_reader(part.reader, part.field)
        self._filters = [part.field.exists(), *as_filters(query, part.alias_filter)]
        self._rows = min(search_size, _page_rows(part.field, self._reader))
        self._pit: str | None = None
        self._can_have_pit = True

    def read(self) -> Generator[Page, None, None]:
        part = self._part
        # Objects of a nested field have priorities of their own, which the cluster cannot compute.
        thin = part.field.nested is None
        kept = self._draw.limit / 2.0**64 if thin else 1.0
        density = kept * part.count / (part.last - part.first + 1)
        width = math.ceil(self._rows / max(density, 1e-9))
        start = part.first
        try:
            while start <= part.last:
                end = min(part.last, start + width - 1)
                page = self._page(start, end, thin)
                full = page.hits >= self._rows
                read = (page.last if full else end) - start + 1
                # The next window is as wide as one page was here, but grows no faster than fourfold over empty
                # stretches.
                width = min(4 * width, math.ceil(read * self._rows / max(page.hits, 1)))
                width = max(width, self._rows)
                start += read
                yield page
        finally:
            self._close()

    def _page(self, first: int, last: int, thin: bool) -> Page:
        window = {"range": {"_seq_no": {"gte": first, "lte": last}}}
        body = page_body(self._draw.query([*self._filters, window], thin), self._reader, self._rows)
        for _ in range(3):
            self._open()
            try:
                return self._search(body)
            except ServerError as error:
                # An expired or lost context: nothing before `first` is needed again, so a new one goes on from here.
                if self._pit is None or not _is_lost_context(error):
                    raise
                self._pit = None
                self._session.stats.retried += 1
        return self._search(body)

    def _search(self, body: dict[str, Any]) -> Page:
        params = {"allow_partial_search_results": "false"}
        path = "/_search"
        if self._pit is not None:
            body = {**body, "pit": {"id": self._pit, "keep_alive": KEEP_ALIVE}}
        else:
            path = f"/{path_of(self._part.index)}/_search"
            # The same copy of the shard for all pages: another one may not have refreshed as far.
            params["preference"] = f"_shards:{self._part.shard}|_primary_first"
        page: Page = self._session.send(
            "POST", path, params, body, accept=self._reader.accept, check=self._reader.decode
        )
        if page.pit_id:
            self._pit = page.pit_id
        return page

    def _open(self) -> None:
        if self._pit is not None or not self._can_have_pit:
            return
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
            if error.status not in (400, 403, 405) and "too many" not in error.reason.lower():
                raise
            self._can_have_pit = False

    def _close(self) -> None:
        pit, self._pit = self._pit, None
        if pit is None:
            return
        # It expires by itself, and must not hide the error that ended the read.
        with suppress(Exception):
            self._session.send("DELETE", "/_search/point_in_time", body={"pit_id": [pit]}, attempts=2)


class _ReadMetrics:
    """Beam metrics of a slice. Only counts on the thread that runs the DoFn, so the session gathers and this
    reports.
    """

    def __init__(self) -> None:
        self.without = Metrics.counter(METRICS, "documents_without_vector")
        self._requests = Metrics.counter(METRICS, "requests")
        self._retried = Metrics.counter(METRICS, "requests_retried")
        self._bytes_received = Metrics.counter(METRICS, "bytes_received")
        self._request_msec = Metrics.distribution(METRICS, "request_msec")
        self._seen = (0, 0, 0, 0)

    def report(self, stats: RequestStats) -> None:
        """Counts what was added since the last report."""
        requests, retried, received, times = self._seen
        self._seen = (stats.requests, stats.retried, stats.bytes_received, len(stats.request_msec))
        self._requests.inc(self._seen[0] - requests)
        self._retried.inc(self._seen[1] - retried)
        self._bytes_received.inc(self._seen[2] - received)
        for msec in stats.request_msec[times : self._seen[3]]:
            self._request_msec.update(msec)


def _page_rows(field: VectorField, reader: Reader) -> int:
    """Rows of a page: one block, about 4 MB, which is where bigger pages stop being faster."""
    rows = block_rows(field.columns * field.dtype.itemsize)
    return max(1, rows // 4) if reader.name == "source" else rows


def _blocks(priorities: np.ndarray, vectors: np.ndarray) -> Iterator[VectorBlock]:
    if not len(priorities):
        return
    rows = block_rows(vectors.shape[1] * vectors.itemsize)
    for start in range(0, len(priorities), rows):
        yield VectorBlock(priorities[start : start + rows], vectors[start : start + rows])


def _is_lost_context(error: ServerError) -> bool:
    return error.status == 404 or "search_context_missing" in error.type


def _ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """`items`, with the next one made by another thread while the caller works on this one.

    Only one thread at a time is inside `items`. It is closed on every way out.
    """
    done = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="next-page")
    try:
        following = pool.submit(next, items, done)
        while (item := following.result()) is not done:
            following = pool.submit(next, items, done)
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        items.close()
