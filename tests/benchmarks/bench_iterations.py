# SPDX-License-Identifier: Apache-2.0
"""What more iterations and restarts of k-means buy: `--niter` and `--nredo` against the defaults.

    python -m tests.benchmarks.bench_iterations [--nlist 256] [--folder .data/patches]

Trains IVF-PQ on the image patches of `make train` (real vectors; they are made if they are not there), for several
--niter and --nredo, and measures on vectors that were held out: the mean squared error of the coarse centroids and of
the PQ codes, and recall@10 at nprobes 16 among all vectors. Prints each with the processor seconds of the training,
all as ratios to the defaults. Each is the mean over several samples, since the sample alone moves recall by half a
percent. One thread, because threads that wait for one another count as busy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import faiss
import numpy as np

from tests import demo
from transforms import faiss_training
from transforms.request import TrainingRequest

M, NPROBES, HELD_OUT = 48, 16, 2_000
#: (niter, nredo) of both k-means; None is the default.
SETTINGS = ((5, None), (None, None), (25, None), (50, None), (None, 3))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nlist", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path(".data/patches"))
    parser.add_argument("--samples", type=int, default=3)
    given = parser.parse_args()
    demo.write_patches(given.folder)
    vectors = demo.read_parquet(list(given.folder.glob("patches-*.parquet")))
    results = {setting: [] for setting in SETTINGS}
    for number in range(given.samples):
        order = np.random.default_rng(number).permutation(len(vectors))
        held_out, rest = vectors[order[:HELD_OUT]], vectors[order[HELD_OUT:]]
        exact = faiss.IndexFlatL2(vectors.shape[1])
        exact.add(rest)
        truth = exact.search(held_out, 10)[1]
        sample = np.ascontiguousarray(rest[: 256 * given.nlist])
        for setting in SETTINGS:
            results[setting].append(evaluate(sample, rest, held_out, truth, given.nlist, *setting))
    print(f"{len(sample):,} x {vectors.shape[1]}, nlist {given.nlist}, PQ {M}, mean of {given.samples} samples")
    print("niter nredo   training   coarse error       PQ error          recall@10")
    base = [statistics.mean(each) for each in zip(*results[None, None], strict=True)]
    for (niter, nredo), runs in results.items():
        seconds, coarse, fine, recall = (statistics.mean(each) for each in zip(*runs, strict=True))
        spread = statistics.stdev(run[3] for run in runs)
        print(
            f"{niter or 'dflt':>5} {nredo or 1:>5}   {seconds / base[0]:6.2f} x   {coarse / base[1]:10.4f} x   "
            f"{fine / base[2]:10.4f} x   {recall:.4f} ({recall - base[3]:+.4f}, sd {spread:.4f})",
            flush=True,
        )


def evaluate(
    sample: np.ndarray,
    rest: np.ndarray,
    held_out: np.ndarray,
    truth: np.ndarray,
    nlist: int,
    niter: int | None,
    nredo: int | None,
) -> tuple[float, float, float, float]:
    """Processor seconds of the training, mean squared errors of held-out vectors (coarse, PQ), recall@10."""
    parameters = {"nlist": nlist, "encoder": {"name": "pq", "parameters": {"m": M, "code_size": 8}}}
    method = {"name": "ivf", "engine": "faiss", "parameters": parameters}
    body = {"training_index": "i", "training_field": "f", "dimension": sample.shape[1], "method": method}
    request = TrainingRequest.from_fields(body)
    started = time.process_time()
    blob = faiss_training.train(sample.copy(), request, 1, niter=niter, nredo=nredo)
    seconds = time.process_time() - started
    index = faiss.deserialize_index(np.frombuffer(blob, np.uint8))
    coarse = float(index.quantizer.search(held_out, 1)[0].mean())
    decoded = index.sa_decode(index.sa_encode(held_out))
    fine = float(((decoded - held_out) ** 2).sum(axis=1).mean())
    index.add(rest)
    index.nprobe = NPROBES
    found = index.search(held_out, 10)[1]
    recall = statistics.mean(len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True))
    return seconds, coarse, fine, recall


if __name__ == "__main__":
    main()
