# SPDX-License-Identifier: Apache-2.0
"""`knn-train` on Parquet against a bare pyarrow + numpy + faiss script on the same rows.

    python -m tests.benchmarks.bench_parquet [--rows 1000000] [--nlist 1024] [--sample N] [--pairs 3] [--together]

Prints wall time, processor time and peak memory of each, their ratios, and whether the models have the same SHA-256;
then the share of the evaluation in a run that has one.
With `--together` both run at the same time, which is the fairer comparison on a machine that does other work meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.benchmarks.measure import Measured, measure
from tests.demo import write_parquet
from transforms.quality import EVAL_VECTORS

DIMENSION, M, FILE_ROWS = 128, 16, 250_000
HERE = Path(__file__).parent


def make_data(folder: Path, rows: int) -> str:
    """Clustered vectors (2 000 centres, standard deviation 0.5): uniform ones make any IVF look uselessly bad."""
    folder.mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng(42).standard_normal((2_000, DIMENSION), np.float32)
    for number in range(rows // FILE_ROWS):
        path = folder / f"part-{number:03}.parquet"
        if not path.exists():
            rng = np.random.default_rng(number)
            noise = 0.5 * rng.standard_normal((FILE_ROWS, DIMENSION), np.float32)
            write_parquet(path, centres[rng.integers(0, len(centres), FILE_ROWS)] + noise)
    return f"{folder}/part-*.parquet"


def ours(pattern: str, nlist: int, size: int, folder: str, number: int, *more: str) -> tuple[Measured, dict]:
    method = {"name": "ivf", "engine": "faiss", "parameters": {"nlist": nlist}}
    method["parameters"]["encoder"] = {"name": "pq", "parameters": {"m": M, "code_size": 8}}  # type: ignore[index]
    fields = ["--dimension", str(DIMENSION), "--method", json.dumps(method), "--vector_column", "vector"]
    fields += ["--max_training_vector_count", str(size), "--use_all_vectors"]
    where = ["--parquet", pattern, "--model_dir", folder, "--model_id", f"run-{number}"]
    where += ["--eval_vectors", "0"]  # the bare script measures nothing either
    measured = measure([sys.executable, "-m", "pipelines.train", *fields, *where, *more])
    return measured, json.loads(Path(folder, f"run-{number}", "model.json").read_text())["provenance"]


def bare(pattern: str, nlist: int, size: int) -> Measured:
    factory = f"IVF{nlist},PQ{M}x8np"
    return measure([sys.executable, str(HERE / "bare_script.py"), pattern, str(size), factory])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--sample", type=int, help="vectors to train on; by default as many as faiss uses")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="run both of a pair at the same time")
    parser.add_argument("--data", type=Path, default=Path(".data/bench"))
    given = parser.parse_args()
    pattern = make_data(given.data / str(given.rows), given.rows)
    size = min(given.rows, given.sample or 256 * max(given.nlist, 256))
    walls, over, processor, peaks, same, trainings, ratios = [], [], [], [], [], [], []
    shares, evaluated_peaks = [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2 if given.together else 1) as pool:
        for number in range(given.pairs):
            baseline = pool.submit(bare, pattern, given.nlist, size)
            run = pool.submit(ours, pattern, given.nlist, size, folder, number)
            theirs, (mine, told) = baseline.result(), run.result()
            same.append(told["blob_sha256"] in theirs.output)
            walls.append(mine.seconds / theirs.seconds)
            over.append(mine.seconds - 1.08 * theirs.seconds)
            processor.append(mine.processor_seconds / theirs.processor_seconds)
            peaks.append(mine.peak_bytes / theirs.peak_bytes)
            found = re.search(r"read .*? s, train (.*?) s", theirs.output)
            assert found is not None
            trainings.append(told["seconds"]["train"])
            ratios.append(trainings[-1] / float(found[1]))
            print(f"bare {_told(theirs)}  ({found[0]})")
            print(f"ours {_told(mine)}  (train {trainings[-1]:.2f} s)", flush=True)
            more = ["--eval_vectors", str(EVAL_VECTORS)]
            whole, evaluated = ours(pattern, given.nlist, size, folder, given.pairs + number, *more)
            shares.append(evaluated["seconds"]["evaluate"] / whole.seconds)
            evaluated_peaks.append(whole.peak_bytes / theirs.peak_bytes)
            assert evaluated["blob_sha256"] == told["blob_sha256"]
            evaluate = f"evaluate {evaluated['seconds']['evaluate']:.2f} s, {shares[-1]:.1%}"
            print(f"ours {_told(whole)}  ({evaluate})", flush=True)
    print(
        f"{given.rows:,} x {DIMENSION}, nlist {given.nlist}, PQ {M}, sample {size:,}: median of {given.pairs} pairs: "
        f"wall {statistics.median(walls):.3f} x bare ({statistics.median(over):+.2f} s against 1.08 x bare), "
        f"processor time {statistics.median(processor):.3f} x bare, "
        f"peak memory {statistics.median(peaks):.3f} x bare, training {statistics.median(trainings):.2f} s "
        f"({statistics.median(ratios):.3f} x bare), "
        f"same SHA-256: {all(same)}; with evaluation: its share of the wall time {statistics.median(shares):.1%}, "
        f"peak memory {statistics.median(evaluated_peaks):.3f} x bare"
    )


def _told(run: Measured) -> str:
    return f"{run.seconds:6.2f} s {run.processor_seconds:6.2f} s of processor {run.peak_bytes / 1e6:6.0f} MB"


if __name__ == "__main__":
    main()
