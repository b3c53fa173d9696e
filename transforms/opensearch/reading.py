# SPDX-License-Identifier: Apache-2.0
"""`ReadFromOpenSearch`: the vectors of a `knn_vector` field, thinned by the cluster before they travel.

`planning` says which slices there are and `slice_reader` reads one of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from transforms.errors import RequestError
from transforms.opensearch.connection import OpenSearchConnection
from transforms.opensearch.decoding import ORDINALS
from transforms.opensearch.pages import READERS, Draw
from transforms.opensearch.planning import Plan, Slice, make_plan
from transforms.opensearch.session import LAUNCHER_ATTEMPTS, POOL_SIZE, RequestStats, ServerError, Session
from transforms.opensearch.slice_reader import SliceReader
from transforms.opensearch.throttle import Throttle
from transforms.reading import METRICS, ReadVectors
from transforms.vectors import NUMPY_TYPES, RejectedVector, SourceSummary, VectorBlock, block_rows

#: The plugin's limit and default of `search_size`.
MAX_SEARCH_SIZE = 10_000

#: Requests of one worker process that a cluster works on at one time. See tests/benchmarks/README.md.
MAX_REQUESTS_IN_FLIGHT = 4


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
      max_requests_in_flight: most requests that each process has in flight, 1 to 64.
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
    max_requests_in_flight: int = MAX_REQUESTS_IN_FLIGHT

    def __post_init__(self) -> None:
        if self.data_type not in NUMPY_TYPES:
            raise RequestError(f"data type {self.data_type!r} is not one of {', '.join(NUMPY_TYPES)}")
        if not 1 <= self.search_size <= MAX_SEARCH_SIZE:
            raise RequestError(f"Search size {self.search_size} is invalid. Search size must be between 0 and 10,000")
        if self.reader not in ("auto", *READERS):
            raise RequestError(f'reader "{self.reader}" is not one of auto, {", ".join(READERS)}')
        if self.slices_wanted < 0:
            raise RequestError(f"{self.slices_wanted} slices")
        if not 1 <= self.max_requests_in_flight <= POOL_SIZE:
            raise RequestError(f"max_requests_in_flight is {self.max_requests_in_flight}, expected 1 to {POOL_SIZE}")

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
        throttle = Throttle.of(self.connection.url, self.max_requests_in_flight)
        pace = throttle.pace(part.nodes)
        with Session(self.connection, gate=pace) as session, throttle.reader():
            pages = SliceReader(session, throttle, pace, part, self._query, draw, self.search_size).read()
            try:
                for page in pages:
                    metrics.report(session.stats)
                    for row, reason in page.bad:
                        reject(RejectedVector(part.index, f"shard {part.shard}, _seq_no {row}", reason))
                    priorities = draw.priorities(page, part.index, part.shard, nested)
                    wanted = draw.wanted(priorities)
                    positions = part.positions(page.rows // ORDINALS if nested else page.rows)
                    yield from _blocks(priorities[wanted], page.vectors[wanted], positions[wanted])
            except ServerError as error:
                raise session.explain(error) from None
            finally:
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
    max_requests_in_flight: int = MAX_REQUESTS_IN_FLIGHT
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
            self.max_requests_in_flight,
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


class _ReadMetrics:
    """Beam metrics of a slice. Only counts on the thread that runs the DoFn, so the session gathers and this
    reports.
    """

    def __init__(self) -> None:
        self.without = Metrics.counter(METRICS, "documents_without_vector")
        self._requests = Metrics.counter(METRICS, "requests")
        self._retried = Metrics.counter(METRICS, "requests_retried")
        self._bytes_received = Metrics.counter(METRICS, "bytes_received")
        self._paused_msec = Metrics.counter(METRICS, "paused_msec")
        self._request_msec = Metrics.distribution(METRICS, "request_msec")
        self._seen = (0, 0, 0, 0, 0)

    def report(self, stats: RequestStats) -> None:
        """Counts what was added since the last report."""
        requests, retried, received, paused, times = self._seen
        self._seen = (
            stats.requests,
            stats.retried,
            stats.bytes_received,
            stats.paused_msec,
            len(stats.request_msec),
        )
        self._requests.inc(self._seen[0] - requests)
        self._retried.inc(self._seen[1] - retried)
        self._bytes_received.inc(self._seen[2] - received)
        self._paused_msec.inc(self._seen[3] - paused)
        for msec in stats.request_msec[times : self._seen[4]]:
            self._request_msec.update(msec)


def _blocks(priorities: np.ndarray, vectors: np.ndarray, positions: np.ndarray) -> Iterator[VectorBlock]:
    if not len(priorities):
        return
    rows = block_rows(vectors.shape[1] * vectors.itemsize)
    for start in range(0, len(priorities), rows):
        part = slice(start, start + rows)
        yield VectorBlock(priorities[part], vectors[part], positions[part])
