# SPDX-License-Identifier: Apache-2.0
"""Reading from OpenSearch as the index grows, as requests are in flight together, and where the time of a page goes.

    python -m tests.benchmarks.bench_opensearch_growth [--rows 100000 400000 1600000] [--repeats 3]

Starts a server, fills indices of 64 dimensions in 4 shards (minutes for 1.6 M), and prints

* for a sample of 20,000 from each index: bytes received, seconds, requests, the server's processor time, and the
  seconds of a whole `knn-train` on it;
* for `--max_requests_in_flight` 1 to 8: seconds of that sample and of the whole of the middle index, directly and with
  each request held up by 20 ms, as by a network;
* for the whole of the middle index: the server's own time (`took`) against the time to decode its pages.

Of the repeats the fastest counts; what is compared takes turns.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from opensearchpy import OpenSearch

from tests.benchmarks.measure import measure
from tests.opensearch_server import OpenSearchServer
from transforms.opensearch import OpenSearchConnection, OpenSearchVectors, reading, slice_reader
from transforms.opensearch.decoding import Page
from transforms.sampling import keep_fraction

DIMENSION, SHARDS, SAMPLE, HELD_UP_S = 64, 4, 20_000, 0.02
IN_FLIGHT = (1, 2, 4, 8)


@dataclass
class Measured:
    seconds: float = 0.0
    server_seconds: float = 0.0
    rows: int = 0
    received: int = 0
    requests: int = 0
    took: float = 0.0
    decoding: float = 0.0


counted = Measured()


class CountingSession(reading.Session):
    def close(self) -> None:
        counted.received += self.stats.bytes_received
        counted.requests += self.stats.requests
        super().close()


def timed(decode: Callable[[bytes], Page]) -> Callable[[bytes], Page]:
    """`decode` with its own time, and the server's as it stands in the page, added to `counted`."""

    def decode_timed(data: bytes) -> Page:
        found = re.search(rb"\x64took(?:([\x00-\x17])|\x18(.)|\x19(..)|\x1a(....))", data[:200], re.DOTALL)
        assert found is not None
        counted.took += int.from_bytes(next(filter(None, found.groups())), "big") / 1000
        started = time.thread_time()
        page = decode(data)
        counted.decoding += time.thread_time() - started
        return page

    return decode_timed


class Relay:
    """Passes bytes on to a local port; what a client sends waits HELD_UP_S first. A network cannot be had here."""

    def __init__(self, port: int):
        self._target = ("localhost", port)
        self._listener = socket.create_server(("localhost", 0))
        self.url = f"http://localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for source, target, wait in ((client, server, HELD_UP_S), (server, client, 0.0)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pump, args=(source, target, wait), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, wait: float) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                time.sleep(wait)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def fill(client: OpenSearch, index: str, rows: int) -> None:
    if client.indices.exists(index=index):
        return
    settings = {"number_of_shards": SHARDS, "number_of_replicas": 0, "refresh_interval": "-1"}
    mapping = {"properties": {"vec": {"type": "knn_vector", "dimension": DIMENSION}}}
    client.indices.create(index=index, body={"settings": settings, "mappings": mapping})
    for start in range(0, rows, 2000):
        # Few digits are quick to write and to index; what is read is float32 in any case.
        matrix = np.random.default_rng(start).integers(-999, 1000, (min(2000, rows - start), DIMENSION)) / 100
        body = "".join(f'{{"index":{{}}}}\n{{"vec":{row}}}\n' for row in matrix.tolist())
        assert not client.bulk(index=index, body=body)["errors"]
    client.indices.refresh(index=index)
    client.indices.forcemerge(index=index, max_num_segments=5)


def read(client: OpenSearch, source: OpenSearchVectors, sample: int | None) -> Measured:
    """One read of all slices, planning included."""
    global counted
    counted = Measured()
    before = server_seconds(client)
    started = time.monotonic()
    count = source.summary().count
    keep = 1.0 if sample is None else keep_fraction(sample, count)
    parts = source.slices()
    counted.rows = sum(len(block) for part in parts for block in source.read(part, keep, refuse))
    counted.seconds = time.monotonic() - started
    counted.server_seconds = server_seconds(client) - before
    assert counted.rows == count if sample is None else counted.rows >= sample
    return counted


def train(url: str, rows: int) -> float:
    """Seconds of `knn-train` as a command, IVF with PQ on SAMPLE vectors."""
    parameters = {"nlist": 128, "encoder": {"name": "pq", "parameters": {"m": 8, "code_size": 8}}}
    fields = {
        "training_index": f"growth-{rows}",
        "training_field": "vec",
        "dimension": DIMENSION,
        "max_training_vector_count": SAMPLE,
        "method": json.dumps({"name": "ivf", "engine": "faiss", "parameters": parameters}),
        "opensearch_url": url,
    }
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--{name}={value}" for name, value in fields.items()]
        return measure([sys.executable, "-m", "pipelines.train", *words, "--model_dir", folder]).seconds


def server_seconds(client: OpenSearch) -> float:
    """Processor time of the one node so far, which it looks up once a second."""
    time.sleep(1.1)
    (node,) = client.nodes.stats(metric="process")["nodes"].values()
    return float(node["process"]["cpu"]["total_in_millis"]) / 1000


def refuse(bad: Any) -> None:
    raise AssertionError(bad)


def fastest(repeats: int, ways: dict[Any, Callable[[], Measured]]) -> dict[Any, Measured]:
    """The fastest run of each way; they take turns."""
    runs: dict[Any, list[Measured]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(way())
    return {name: min(each, key=lambda run: run.seconds) for name, each in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 400_000, 1_600_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, help="of a server that is up; its indices of an earlier run are used")
    given = parser.parse_args()
    reading.Session = CountingSession  # type: ignore[misc]
    make_reader = slice_reader.make_reader

    def make_timed_reader(name: str, field: Any) -> Any:
        made = make_reader(name, field)
        return replace(made, decode=timed(made.decode))

    slice_reader.make_reader = make_timed_reader  # type: ignore[assignment]
    server = None if given.port else OpenSearchServer("3.6.0", heap="3g")
    with closing(server) if server else nullcontext():
        if server:
            server.start()
        url = server.url if server else f"http://localhost:{given.port}"
        client = OpenSearch(url, timeout=300)
        for rows in given.rows:
            fill(client, f"growth-{rows}", rows)
        with closing(Relay(int(url.rpartition(":")[2]))) as relay:
            report(client, url, relay.url, given.rows, given.repeats)


def report(client: OpenSearch, url: str, slow_url: str, sizes: list[int], repeats: int) -> None:
    def source(rows: int, in_flight: int = reading.MAX_REQUESTS_IN_FLIGHT, at: str = url) -> OpenSearchVectors:
        # A new one each time: planning is part of the work.
        index = f"growth-{rows}"
        return OpenSearchVectors(OpenSearchConnection(at), index, "vec", DIMENSION, max_requests_in_flight=in_flight)

    def job(rows: int, sample: int | None, in_flight: int, at: str) -> Callable[[], Measured]:
        return lambda: read(client, source(rows, in_flight, at), sample)

    found = fastest(repeats, {rows: job(rows, SAMPLE, reading.MAX_REQUESTS_IN_FLIGHT, url) for rows in sizes})
    for rows, run in found.items():
        print(
            f"{rows:>10,} x {DIMENSION}, sample {SAMPLE:,}: {run.rows:,} sent, {run.received / 1e6:.2f} MB, "
            f"{run.requests} requests, {run.seconds:.2f} s, server {run.server_seconds:.2f} s of processor time",
            flush=True,
        )
    whole: dict[int, list[float]] = {rows: [] for rows in sizes}
    for _ in range(repeats):
        for rows in sizes:
            whole[rows].append(train(url, rows))
    for rows, each in whole.items():
        print(f"knn-train on {rows:,}: {min(each):.2f} s, {min(each) / min(whole[sizes[0]]):.2f} x of the first")
    all_bytes, all_seconds = [r.received for r in found.values()], [r.seconds for r in found.values()]
    print(
        f"largest over smallest: bytes {max(all_bytes) / min(all_bytes):.3f}, "
        f"time {max(all_seconds) / min(all_seconds):.2f}"
    )
    middle = sizes[len(sizes) // 2]
    for label, rows, sample, at in (
        (f"sample of {max(sizes):,}", max(sizes), SAMPLE, url),
        (f"sample of {max(sizes):,}, 20 ms away", max(sizes), SAMPLE, slow_url),
        (f"all {middle:,}", middle, None, url),
        (f"all {middle:,}, 20 ms away", middle, None, slow_url),
    ):
        found = fastest(repeats, {n: job(rows, sample, n, at) for n in IN_FLIGHT})
        print(f"{label}, by requests in flight:")
        for n, run in found.items():
            print(
                f"  {n}: {run.seconds:6.2f} s ({found[1].seconds / run.seconds:.2f} x of 1)   "
                f"server {1e6 * run.server_seconds / run.rows:6.2f} us of processor time a vector sent",
                flush=True,
            )
    run = fastest(repeats, {"one": job(middle, None, 1, url)})["one"]
    print(
        f"pages of all {run.rows:,}, one at a time: {run.seconds:.2f} s, of which the server took {run.took:.2f} s; "
        f"decoding {run.decoding:.2f} s, {run.decoding / run.took:.3f} x the server's own time, "
        f"{run.rows / run.decoding / 1e6:.1f} M vectors/s"
    )


if __name__ == "__main__":
    main()
