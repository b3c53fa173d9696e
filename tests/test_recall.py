# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import faiss
import numpy as np
import pytest

from transforms.recall import CURVE, Neighbours, expected

RNG = np.random.default_rng(5)


def exact(base: np.ndarray, queries: np.ndarray, depth: int) -> Neighbours:
    distances, ids = faiss.knn(queries, base, depth)
    return Neighbours(distances, ids, len(base))


def test_recall_counts_the_true_neighbours_among_the_first_found() -> None:
    true = Neighbours(np.array([[1.0, 2, 3, 4]], np.float32), np.array([[7, 3, 9, 1]]), 10)
    distances = true.distances_of(np.array([[3, 8, 7, -1, 9]]))
    assert distances.tolist() == [[2, np.inf, 1, np.inf, 3]]
    assert true.recall(distances, 1).tolist() == [0]  # 3 is found first, 7 is the nearest
    assert true.recall(distances, 2).tolist() == [0.5]
    assert true.recall(distances, 2, among=3).tolist() == [1]
    assert true.recall(distances, 4).tolist() == [0.5]


def test_an_id_that_was_not_found_is_no_neighbour_of_another_query() -> None:
    true = Neighbours(np.array([[1.0], [1.0]], np.float32), np.array([[9], [0]]), 10)
    assert true.distances_of(np.array([[-1], [-1]])).tolist() == [[np.inf], [np.inf]]


def test_of_duplicates_it_does_not_matter_which_is_found() -> None:
    true = Neighbours(np.array([[1.0, 1, 1, 2]], np.float32), np.array([[0, 1, 2, 3]]), 4)
    for found in ([[0, 1]], [[2, 0]], [[1, 2]]):
        assert true.recall(true.distances_of(np.array(found)), 2).tolist() == [1]
    assert true.recall(true.distances_of(np.array([[3, 0]])), 2).tolist() == [0.5]


def test_expected_is_read_off_the_curve_where_the_neighbours_lie_as_far_away() -> None:
    curve = {1: 0.2, 2: 0.3, 4: 0.4, 10: 0.5, 100: 0.9}
    assert expected(curve, 10, 1.0, 1000) == 0.5
    assert expected(curve, 100, 10.0, 1000) == 0.5
    assert expected(curve, 10, 10.0, 1000) == pytest.approx(0.2)
    assert 0.2 < expected(curve, 10, 7.0, 1000) < 0.3
    further = [expected(curve, 10, growth, 1000) for growth in (10, 100, 1000, 1e6)]
    assert further == sorted(further, reverse=True)
    assert 0 < further[-1] < 0.01


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_expected_of_nothing_and_of_everything(share: float) -> None:
    curve = dict.fromkeys(CURVE, share)
    assert expected(curve, 10, 50.0, 1000) == pytest.approx(share, abs=1e-3)


def test_expected_is_what_a_larger_base_shows() -> None:
    """Clustered vectors and a coarse code: recall@10 falls by half from 4 000 to 32 000 vectors."""
    centres = RNG.standard_normal((20, 16))
    vectors = (centres[RNG.integers(0, 20, 33_000)] + 0.5 * RNG.standard_normal((33_000, 16))).astype(np.float32)
    base, queries = vectors[:32_000], vectors[32_000:]
    index = faiss.index_factory(16, "PQ4x6np")
    index.train(base[:16_384])

    def curve(rows: int) -> dict[int, float]:
        index.reset()
        index.add(base[:rows])
        true = exact(base[:rows], queries, 100)
        distances = true.distances_of(index.search(queries, 100)[1])
        return {k: float(true.recall(distances, k).mean()) for k in CURVE}

    large, small = curve(32_000), curve(4_000)
    assert small[10] > 1.5 * large[10]
    for k in (10, 100):
        assert expected(small, k, 8.0, 1000) == pytest.approx(large[k], abs=0.03)
