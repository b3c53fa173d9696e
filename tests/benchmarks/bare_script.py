# SPDX-License-Identifier: Apache-2.0
"""The baseline: what one would write with pyarrow, numpy and faiss, on the same rows. Imports nothing of this project.

    python bare_script.py GLOB SAMPLE_SIZE INDEX_FACTORY

The only thing it takes over is which rows are sampled: those with the smallest hashes of their file and row.
"""

import glob
import hashlib
import os
import sys
import time

import faiss
import numpy as np
import pyarrow.parquet as pq


def priorities(name, rows):
    digest = hashlib.blake2b(f"0\0{name}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.uint64(int.from_bytes(digest, "little")) + (np.arange(rows, dtype=np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def main(pattern, size, factory):
    start = time.time()
    paths = sorted(glob.glob(pattern))
    hashes = [priorities(os.path.basename(path), pq.read_metadata(path).num_rows) for path in paths]
    everything = np.concatenate(hashes)
    cut = np.partition(everything, size - 1)[size - 1]
    chosen = np.sort(everything[everything <= cut])
    sample = None
    for path, own in zip(paths, hashes, strict=True):
        file, row = pq.ParquetFile(path), 0
        for batch in file.iter_batches(8192, columns=["vector"]):
            vectors = batch.column(0).flatten().to_numpy()
            vectors = vectors.reshape(len(batch), -1)
            if sample is None:
                sample = np.empty((size, vectors.shape[1]), np.float32)
            part = own[row : row + len(batch)]
            keep = part <= cut
            sample[np.searchsorted(chosen, part[keep])] = vectors[keep]
            row += len(batch)
    read = time.time() - start
    index = faiss.index_factory(sample.shape[1], factory)
    index.make_direct_map()
    index.train(sample)
    trained = time.time() - start - read
    blob = faiss.serialize_index(index).tobytes()
    print(f"read {read:.2f} s, train {trained:.2f} s, sha256 {hashlib.sha256(blob).hexdigest()}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
