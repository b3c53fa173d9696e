# SPDX-License-Identifier: Apache-2.0
"""Training alone: all threads against one, and against `faiss.Index.train` with and without its polysemous step.

    python -m tests.benchmarks.bench_training [--vectors 131072] [--nlist 512] [--repeats 3]

Each way runs in turn; of the repeats the median counts. The bytes of ours and of faiss without the step must be equal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import faiss
import numpy as np

from transforms import faiss_training
from transforms.request import TrainingRequest
from transforms.training import available_cores

DIMENSION, M = 128, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vectors", type=int, default=131_072)
    parser.add_argument("--nlist", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2_000, DIMENSION), np.float32)
    vectors = centres[rng.integers(0, 2_000, given.vectors)]
    vectors += 0.5 * rng.standard_normal(vectors.shape, np.float32)
    encoder = {"name": "pq", "parameters": {"m": M, "code_size": 8}}
    method = {"name": "ivf", "engine": "faiss", "parameters": {"nlist": given.nlist, "encoder": encoder}}
    body = {"training_index": "i", "training_field": "f", "dimension": DIMENSION, "method": method}
    request = TrainingRequest.from_fields(body)
    cores = available_cores()

    def bare(suffix: str) -> bytes:
        faiss.omp_set_num_threads(cores)
        index = faiss.index_factory(DIMENSION, f"IVF{given.nlist},PQ{M}x8{suffix}")
        index.make_direct_map()
        index.train(vectors)
        return faiss.serialize_index(index).tobytes()

    ways: dict[str, Callable[[], bytes]] = {
        f"ours, {cores} threads": lambda: faiss_training.train(vectors, request, cores),
        "ours, 1 thread": lambda: faiss_training.train(vectors, request, 1),
        f"faiss without polysemous, {cores} threads": lambda: bare("np"),
        f"faiss as the plugin asks for it, {cores} threads": lambda: bare(""),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    blobs: dict[str, bytes] = {}
    for _ in range(given.repeats):
        for name, way in ways.items():
            start = time.monotonic()
            blobs[name] = way()
            seconds[name].append(time.monotonic() - start)
    ours, one, plain, plugin = (statistics.median(each) for each in seconds.values())
    for name, each in seconds.items():
        print(f"{name:48} {statistics.median(each):7.2f} s")
    first, *others = blobs.values()
    print(
        f"{given.vectors:,} x {DIMENSION}, nlist {given.nlist}, PQ {M}: all threads {ours / one:.2f} x one thread, "
        f"{ours / plain:.2f} x faiss without polysemous, {ours / plugin:.2f} x faiss with it; "
        f"same bytes: {first == others[0] == others[1]}"
    )


if __name__ == "__main__":
    main()
