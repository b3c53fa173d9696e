# SPDX-License-Identifier: Apache-2.0
"""Reading vectors from OpenSearch against `opensearchpy.helpers.scan` into numpy, the whole index and a sample of it.

    python -m tests.benchmarks.bench_opensearch_read [--versions 3.6.0 2.19.1] [--rows 200000] [--repeats 3]

Starts the servers, fills indices, and prints vectors a second, bytes and ratios. Both ways run in turn on the same
index; of the repeats the fastest counts. Every read is checked against what was indexed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from contextlib import closing
from typing import Any

import numpy as np
from opensearchpy.helpers import scan

from tests.opensearch_server import OpenSearchServer
from transforms.opensearch import OpenSearchConnection, OpenSearchVectors, reading
from transforms.sampling import keep_fraction

SAMPLE = 10_000
SHARDS = 4


class CountingSession(reading.Session):
    received = 0

    def close(self) -> None:
        CountingSession.received += self.stats.bytes_received
        super().close()


def fill(server: OpenSearchServer, index: str, rows: int, dimension: int) -> str:
    """Returns a digest of the vectors in order of their bytes."""
    client = server.client()
    settings = {"number_of_shards": SHARDS, "number_of_replicas": 0, "refresh_interval": "-1"}
    mapping = {"properties": {"vec": {"type": "knn_vector", "dimension": dimension}}}
    client.indices.create(index=index, body={"settings": settings, "mappings": mapping})
    rng = np.random.default_rng(dimension)
    everything = []
    for start in range(0, rows, 2000):
        matrix = rng.standard_normal((min(2000, rows - start), dimension)).astype("<f4")
        everything.append(matrix)
        body = "".join('{"index":{}}\n' + json.dumps({"vec": row}) + "\n" for row in matrix.tolist())
        assert not client.bulk(index=index, body=body)["errors"]
    client.indices.refresh(index=index)
    return digest(np.concatenate(everything))


def digest(matrix: np.ndarray) -> str:
    return hashlib.sha256(b"".join(sorted(map(bytes, matrix)))).hexdigest()


def by_scan(server: OpenSearchServer, index: str) -> np.ndarray:
    query = {"query": {"exists": {"field": "vec"}}}
    hits = scan(server.client(), query=query, index=index, size=1000, _source=["vec"])
    return np.array([hit["_source"]["vec"] for hit in hits], np.float32)


def by_us(source: OpenSearchVectors, keep: float) -> tuple[np.ndarray, np.ndarray]:
    def refuse(bad: Any) -> None:
        raise AssertionError(bad)

    blocks = [block for part in source.slices() for block in source.read(part, keep, refuse)]
    return np.concatenate([b.priorities for b in blocks]), np.concatenate([b.vectors for b in blocks])


def fastest(repeats: int, work: Any) -> tuple[float, Any]:
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        result = work()
        times.append(time.monotonic() - started)
    return min(times), result


def compare(server: OpenSearchServer, index: str, rows: int, dimension: int, repeats: int) -> None:
    expected = fill(server, index, rows, dimension)

    def source(reader: str = "auto") -> OpenSearchVectors:
        # A new one each time: planning is part of the work.
        return OpenSearchVectors(OpenSearchConnection(server.url), index, "vec", dimension, seed=1, reader=reader)

    theirs, found = fastest(max(1, repeats - 1), lambda: by_scan(server, index))
    assert digest(found) == expected
    print(f"{server.version} {rows:,} x {dimension}")
    print(f"  helpers.scan, _source, numpy      {rows / theirs:>10,.0f} vectors/s")
    CountingSession.received = 0
    ours, (priorities, found) = fastest(repeats, lambda: by_us(source(), 1.0))
    assert digest(found) == expected
    whole = CountingSession.received / repeats
    print(f"  ReadFromOpenSearch, {source().summary().reader:<12}  {rows / ours:>10,.0f} vectors/s", end="")
    print(f"   {theirs / ours:5.1f} x scan   {whole / rows:,.0f} bytes/vector")
    slow, (_, found) = fastest(1, lambda: by_us(source("source"), 1.0))
    assert digest(found) == expected
    print(f"  ReadFromOpenSearch, source        {rows / slow:>10,.0f} vectors/s   {theirs / slow:5.1f} x scan")
    CountingSession.received = 0
    keep = keep_fraction(SAMPLE, rows)
    thinned, (some, _) = fastest(repeats, lambda: by_us(source(), keep))
    assert np.array_equal(np.sort(some), np.sort(priorities[priorities < np.uint64(int(keep * 2**64))]))
    assert len(some) >= SAMPLE
    received = CountingSession.received / repeats
    goal = 1.15 * SAMPLE * (5.6 * dimension + 80)
    sent = f"a sample of {SAMPLE:,} ({len(some):,} sent)"
    print(f"  {sent:<33} {thinned:>9.3f} s           {ours / thinned:5.1f} x own full read", end="")
    print(f"   {received / 1e6:.2f} MB, {received / goal:.2f} of the goal {goal / 1e6:.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--versions", nargs="+", default=["3.6.0", "2.19.1"])
    parser.add_argument("--rows", type=int, default=200_000, help="of 128 dimensions; a fifth of it of 768")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    reading.Session = CountingSession  # type: ignore[misc]
    for version in options.versions:
        with closing(OpenSearchServer(version, heap="1g")) as server:
            server.start()
            compare(server, "bench-128", options.rows, 128, options.repeats)
            compare(server, "bench-768", options.rows // 5, 768, options.repeats)


if __name__ == "__main__":
    main()
