# SPDX-License-Identifier: Apache-2.0
"""A Flink cluster of two TaskManagers against one process.

    python -m tests.benchmarks.bench_flink read [--rows 400000]
    python -m tests.benchmarks.bench_flink sample [--rows 4000000] [--nlist 1024] [--sample 2097152]

`read`: a whole OpenSearch index of 64 dimensions, by one stream (one request at a time), by one process as it reads by
itself, and by two TaskManagers. Prints, of the faster of two runs each, seconds from the first block to the last, so
without the start of workers, and what the server's process spent on a vector. Server, cluster and client share this
machine's cores.

`sample`: Parquet to model with a sample of 1 GB. Prints seconds, whether the models are the same, and the largest
element that a worker sent. TaskManagers have the off-heap memory that Flink gives them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import PipelineOptions

from tests.benchmarks import bench_parquet
from tests.benchmarks.bench_opensearch_read import fill
from tests.opensearch_server import OpenSearchServer
from tests.runners import CHECKOUT
from tests.runners.flink_cluster import FlinkCluster
from transforms.opensearch import OpenSearchConnection, ReadFromOpenSearch

DIMENSION = 64

#: Rows, and the times of the first and the last block.
Span = tuple[int, float, float]


def joined(spans: Iterable[Span]) -> Span:
    rows, first, last = 0, float("inf"), 0.0
    for each in spans:
        rows, first, last = rows + each[0], min(first, each[1]), max(last, each[2])
    return rows, first, last


def read(server: OpenSearchServer, rows: int, flags: list[str], in_flight: int = 4) -> tuple[float, float]:
    """Seconds, and processor seconds of the server."""
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            connection = OpenSearchConnection(server.url)
            blocks = pipeline | ReadFromOpenSearch(
                connection, "bench", "vec", DIMENSION, max_requests_in_flight=in_flight
            )
            spans = blocks | beam.Map(lambda block: (len(block), time.time(), time.time()))
            whole = spans | beam.CombineGlobally(joined)
            whole | beam.Map(lambda span, path: Path(path).write_text(json.dumps(span)), file.name)
        counted, first, last = json.loads(Path(file.name).read_text())
    assert counted == rows
    after = process.cpu_times()
    return last - first, after.user + after.system - before.user - before.system


def compare_reading(server: OpenSearchServer, cluster: FlinkCluster, rows: int) -> None:
    here = ["--runner=FnApiRunner"]
    read(server, rows, here)  # the first reading also warms the server up
    for name, flags, in_flight in (
        ("one stream", here, 1),
        ("one process", here, 4),
        ("two TaskManagers", _submit(cluster), 4),
    ):
        seconds, spent = min(read(server, rows, flags, in_flight) for _ in range(2))
        print(
            f"{name:<17} {rows:,} x {DIMENSION}: {seconds:.1f} s, {rows / seconds:,.0f} vectors/s, "
            f"server {1e6 * spent / rows:.1f} processor us a vector",
            flush=True,
        )


def compare_models(cluster: FlinkCluster, rows: int, nlist: int, size: int) -> None:
    pattern = bench_parquet.make_data(Path(".data/bench", str(rows)).absolute(), rows)
    with tempfile.TemporaryDirectory() as folder:
        local, expected = bench_parquet.ours(pattern, nlist, size, folder, 0)
        flags = [*_submit(cluster), f"--temp_location={folder}/temp"]
        remote, found = bench_parquet.ours(pattern, nlist, size, folder, 1, *flags)
    same = found["blob_sha256"] == expected["blob_sha256"]
    print(
        f"{rows:,} x 128, nlist {nlist}, sample {size:,}: local {local.seconds:.1f} s, Flink {remote.seconds:.1f} s; "
        f"same SHA-256: {same}; largest element sent {cluster.largest_element():,} bytes"
    )


def _submit(cluster: FlinkCluster) -> list[str]:
    return [*cluster.options, f"--setup_file={CHECKOUT}/setup.py"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["read", "sample"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--sample", type=int, default=2_097_152, help="vectors to train on")
    given = parser.parse_args()
    with closing(FlinkCluster()) as cluster:
        cluster.start()
        if "read" in given.parts:
            with closing(OpenSearchServer("3.6.0", heap="1g")) as server:
                server.start()
                rows = given.rows or 400_000
                fill(server, "bench", rows, DIMENSION)
                compare_reading(server, cluster, rows)
        if "sample" in given.parts:
            compare_models(cluster, given.rows or 4_000_000, given.nlist, given.sample)


if __name__ == "__main__":
    main()
