# SPDX-License-Identifier: Apache-2.0
"""What `make train` trains on, and how good the model is: real vectors that need no download.

python -m tests.demo patches FOLDER
python -m tests.demo recall FOLDER MODEL_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIDE = 8
TRAINING, QUERIES, FILES = 200_000, 1_000, 4


def image_patches(queries: int = QUERIES) -> np.ndarray:
    """(200 000 + queries, 192) float32: overlapping 8 x 8 x 3 patches of the two photographs inside scikit-learn,
    shuffled.
    """
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.image import extract_patches_2d

    patches = [extract_patches_2d(image, (SIDE, SIDE)) for image in load_sample_images().images]
    vectors = np.concatenate([part.reshape(len(part), -1) for part in patches])
    chosen = np.random.default_rng(7).permutation(len(vectors))[: TRAINING + queries]
    return vectors[chosen].astype(np.float32)


def write_parquet(path: Path, vectors: np.ndarray) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    pq.write_table(pa.table({"id": np.arange(len(vectors)), "vector": column}), path, row_group_size=10_000)


def read_parquet(paths: list[Path]) -> np.ndarray:
    columns = [pq.read_table(path, columns=["vector"])["vector"].combine_chunks() for path in sorted(paths)]
    return np.concatenate([column.flatten().to_numpy().reshape(len(column), -1) for column in columns])


def write_patches(folder: Path) -> None:
    """Writes `patches-*.parquet` and `queries.parquet`, once."""
    if (folder / "queries.parquet").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    vectors = image_patches()
    for number, part in enumerate(np.array_split(vectors[:TRAINING], FILES)):
        write_parquet(folder / f"patches-{number}.parquet", part)
    write_parquet(folder / "queries.parquet", vectors[TRAINING:])  # last, because it says that all are there


def recall(folder: Path, model: Path, k: int = 10) -> float:
    """Recall@k of the held-out queries when all training patches are indexed with the model, against exact search."""
    base, queries = read_parquet(list(folder.glob("patches-*.parquet"))), read_parquet([folder / "queries.parquet"])
    index = faiss.read_index(str(model / "model.faiss"))
    index.add(base)
    exact = faiss.IndexFlat(base.shape[1], index.metric_type)
    exact.add(base)
    found, true = index.search(queries, k)[1], exact.search(queries, k)[1]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, true, strict=True)]))


def main(command: str, folder: str, model: str = "") -> None:
    if command == "patches":
        write_patches(Path(folder))
        return
    parameters = json.loads(Path(model, "model.json").read_text())["model_definition"]["parameters"]
    value = recall(Path(folder), Path(model))
    print(f"recall@10 of {QUERIES:,} held-out patches, nprobes {parameters['nprobes']}: {value:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
