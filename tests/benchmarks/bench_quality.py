# SPDX-License-Identifier: Apache-2.0
"""Recall to expect, from the vectors in the trainer's memory, against recall with all vectors indexed.

    python -m tests.benchmarks.bench_quality [--rows 200000 500000 1000000] [--base 20000]

Prints for image patches, handwritten digits and clustered vectors, for each space and for codes and flat lists: the
recall measured in the base, the recall to expect, and what faiss finds when the whole source is indexed and searched
for vectors that are not in it. Results do not depend on what else the machine does. With --base the base holds about so
many vectors instead of what is affordable, as if the source were larger.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import faiss
import numpy as np

from tests.benchmarks.bench_parquet import DIMENSION
from tests.demo import TRAINING, image_patches
from transforms import faiss_training, held_out
from transforms.quality import EVAL_VECTORS, evaluate, hold_out
from transforms.recall import Neighbours
from transforms.request import TrainingRequest

SPACES = ("l2", "innerproduct", "cosinesimil")
K = (10, 100)
#: To search the whole source for: as many as keep chance out of it (digits are too few).
QUERIES = 10_000


def image() -> tuple[np.ndarray, np.ndarray]:
    vectors = image_patches(QUERIES)
    return vectors[:TRAINING], vectors[TRAINING:]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """All but 300 are trained on: the queries of the evaluation are trained vectors."""
    from sklearn.datasets import load_digits

    vectors = load_digits().data.astype(np.float32)
    vectors = vectors[np.random.default_rng(1).permutation(len(vectors))]
    return vectors[300:], vectors[:300]


def clustered(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """As in bench_parquet."""
    rng = np.random.default_rng(0)
    centres = np.random.default_rng(42).standard_normal((2_000, DIMENSION), np.float32)
    vectors = centres[rng.integers(0, len(centres), rows + QUERIES)]
    vectors += 0.5 * rng.standard_normal(vectors.shape, np.float32)
    return vectors[:rows], vectors[rows:]


def request(dimension: int, space_type: str, nlist: int, nprobes: int, m: int | None) -> TrainingRequest:
    parameters: dict = {"nlist": nlist, "nprobes": nprobes}
    if m:
        parameters["encoder"] = {"name": "pq", "parameters": {"m": m, "code_size": 8}}
    method = {"name": "ivf", "engine": "faiss", "space_type": space_type, "parameters": parameters}
    body = {"training_index": "i", "training_field": "f", "dimension": dimension, "method": method}
    return TrainingRequest.from_fields(body)


def indexed(blob: bytes, wanted: TrainingRequest, vectors: np.ndarray, queries: np.ndarray) -> dict[int, float]:
    """Recall with all vectors indexed, the request's nprobes, against exact search."""
    vectors, queries = (faiss_training.prepare(part.copy(), wanted) for part in (vectors, queries))
    index = faiss.deserialize_index(np.frombuffer(blob, np.uint8))
    index.add(vectors)
    distances, ids = faiss.knn(queries, vectors, max(K), index.metric_type)
    sign = -1 if index.metric_type == faiss.METRIC_INNER_PRODUCT else 1
    true = Neighbours(sign * distances, ids, len(vectors))
    found = true.distances_of(index.search(queries, max(K))[1])
    return {k: float(true.recall(found, k).mean()) for k in K}


def cases(sizes: Sequence[int]) -> Iterator[tuple[str, np.ndarray, np.ndarray, int, int, tuple[int | None, ...]]]:
    yield ("digits", *digits(), 16, 4, (8, None))
    yield ("image patches", *image(), 256, 8, (48, 24, None))
    for rows in sizes:
        yield ("clustered", *clustered(rows), 256, 8, (16, None))


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = [200_000, 500_000, 1_000_000]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help="of the clustered vectors")
    parser.add_argument("--base", type=int, help="vectors to search in")
    given = parser.parse_args()
    affordable = held_out.BASE_VALUES
    worst = 0.0
    names = [name for k in K for name in (f"@{k} in the base", "to expect", "indexed")]
    print(f"| data, source | model | base | {' | '.join(names)} |")
    print("| --- " * 9 + "|")
    for name, vectors, queries, nlist, nprobes, codes in cases(given.rows):
        for m in codes:
            for space in SPACES:
                wanted = request(vectors.shape[1], space, nlist, nprobes, m)
                trained = min(wanted.usable_vectors, len(vectors))
                sample = vectors[: trained + hold_out(EVAL_VECTORS)].copy()
                blob = faiss_training.train(sample[:trained], wanted, faiss.omp_get_max_threads())
                held_out.BASE_VALUES = given.base * vectors.shape[1] if given.base else affordable
                quality = evaluate(blob, wanted, sample, trained, len(vectors))
                truth = indexed(blob, wanted, vectors, queries)
                at = quality["at"]
                cells = []
                for k in K:
                    worst = max(worst, abs(at["expected"][str(k)] - truth[k]))
                    cells += [f"{at['measured'][str(k)]:.3f}", f"{at['expected'][str(k)]:.3f}", f"{truth[k]:.3f}"]
                model = f"{wanted.index_description}, {space}"
                base = f"{quality['vectors']['base']:,}"
                print(f"| {name}, {len(vectors):,} | {model} | {base} | {' | '.join(cells)} |", flush=True)
    print(f"\nfarthest off: {worst:.3f}")


if __name__ == "__main__":
    main()
