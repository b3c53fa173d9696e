# SPDX-License-Identifier: Apache-2.0
"""What a larger corpus costs: `knn-train` on Parquet of 0.25 M rows x 128 and more, with the same sample size.

    python -m tests.benchmarks.bench_parquet_growth [--rows 250000 1000000 4000000] [--nlist 256] [--pairs 1]

Prints for each size, beside the bare script on the same rows, wall time, processor time, seconds of training, and peak
memory, with the bytes of the files; then what the scan costs, which is what is left when the smallest run is taken
away. 4 M rows are 2.3 GB of files under --data, which are removed at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.bench_parquet import DIMENSION, FILE_ROWS, bare, make_data, ours
from tests.benchmarks.measure import Measured


def shown(run: Measured) -> str:
    return f"{run.seconds:7.2f} s, {run.processor_seconds:6.2f} s of processor time, {run.peak_bytes / 1e6:4.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000, 4_000_000])
    parser.add_argument("--nlist", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path(".data/bench-growth"))
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    given = parser.parse_args()
    size = min(*given.rows, 256 * max(given.nlist, 256))
    everything = given.data / "all"
    make_data(everything, max(given.rows))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in given.rows:
            part = given.data / str(rows)
            part.mkdir(exist_ok=True)
            for path in sorted(everything.iterdir())[: rows // FILE_ROWS]:
                if not (part / path.name).exists():
                    (part / path.name).hardlink_to(path)
            bytes_read = sum(path.stat().st_size for path in part.iterdir())
            mine_used, bare_used = [], []
            for number in range(given.pairs):
                pattern = f"{part}/part-*.parquet"
                theirs = bare(pattern, given.nlist, size)
                mine, told = ours(pattern, given.nlist, folder, rows + number)
                mine_used.append(mine.processor_seconds)
                bare_used.append(theirs.processor_seconds)
                print(
                    f"{rows:>12,} x {DIMENSION} {bytes_read / 1e6:>9,.1f} MB   ours {shown(mine)}, "
                    f"training {told['seconds']['train']:.2f} s   bare {shown(theirs)}   "
                    f"{mine.seconds / theirs.seconds:.3f} x, same SHA-256: {told['blob_sha256'] in theirs.output}",
                    flush=True,
                )
            found.append((rows, bytes_read, statistics.median(mine_used), statistics.median(bare_used)))
    (few, small, fixed, bare_fixed), (many, large, most, bare_most) = found[0], found[-1]
    print(
        f"scan from {few:,} to {many:,} rows, sample {size:,}, a core's worth of processor time: "
        f"ours {(large - small) / (most - fixed) / 1e6:,.0f} MB/s, {(many - few) / (most - fixed) / 1e6:.2f} M rows/s; "
        f"bare {(large - small) / (bare_most - bare_fixed) / 1e6:,.0f} MB/s"
    )
    if not given.keep:
        shutil.rmtree(given.data)


if __name__ == "__main__":
    main()
