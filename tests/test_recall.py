# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import faiss
import numpy as np
import pytest

from transforms.recall import CURVE, Neighbours, curve_of_halves, expected

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
    assert expected(curve, {}, 10, 1.0, 1000) == 0.5
    assert expected(curve, {}, 100, 10.0, 1000) == 0.5
    assert expected(curve, {}, 10, 10.0, 1000) == pytest.approx(0.2)
    assert 0.2 < expected(curve, {}, 10, 7.0, 1000) < 0.3
    further = [expected(curve, {}, 10, growth, 1000) for growth in (10, 100, 1000, 1e6)]
    assert further == sorted(further, reverse=True)
    assert 0 < further[-1] < 0.01


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_expected_of_nothing_and_of_everything(share: float) -> None:
    curve = dict.fromkeys(CURVE, share)
    assert expected(curve, curve, 10, 50.0, 1000) == pytest.approx(share, abs=1e-3)
    assert expected(curve, curve, 100, 5.0, 1000) == share


def test_halves_are_what_an_index_of_half_the_base_finds() -> None:
    base, queries = RNG.standard_normal((4_000, 8)).astype(np.float32), RNG.standard_normal((50, 8)).astype(np.float32)
    index = faiss.index_factory(8, "PQ4x4np")
    index.train(base)
    index.add(base)
    every, found = exact(base, queries, 100), index.search(queries, 100)[1]
    halves = curve_of_halves(every, found, every.distances_of(found))
    assert 20 <= max(halves) < 50
    for k in halves:
        shares = []
        for odd in (0, 1):
            half = np.ascontiguousarray(base[odd::2])
            index.reset()
            index.add(half)
            true = exact(half, queries, k)
            shares.append(true.recall(true.distances_of(index.search(queries, k)[1]), k).mean())
        assert halves[k] == pytest.approx(np.mean(shares), abs=1e-9)


def test_halves_of_a_base_without_neighbours_are_empty() -> None:
    true = Neighbours(np.ones((2, 1), np.float32), np.array([[4], [6]]), 10)
    found = np.array([[4], [-1]])
    assert curve_of_halves(true, found, true.distances_of(found)) == {}


def test_what_the_base_blurs_is_added() -> None:
    assert expected({25: 0.8}, {13: 0.7, 10: 0.7}, 100, 4.0, 1000) == pytest.approx(0.8 + 0.1 * 0.5 / (2**0.5 - 1))
    assert expected({25: 0.99}, {13: 0.7, 10: 0.7}, 100, 4.0, 1000) == 1.0
    assert expected({1: 0.1, 5: 0.8}, {1: 0.1, 2: 0.4}, 10, 8.0, 1000) < 0.8  # half is below depth 1: left as it is


def measured(index: faiss.Index, base: np.ndarray, queries: np.ndarray) -> tuple[dict[int, float], dict[int, float]]:
    """Recall by depth with `base` in the index, and that in halves of it."""
    index.reset()
    index.add(base)
    true, found = exact(base, queries, 100), index.search(queries, 100)[1]
    distances = true.distances_of(found)
    return {k: float(true.recall(distances, k).mean()) for k in CURVE}, curve_of_halves(true, found, distances)


def test_expected_is_what_a_larger_base_shows() -> None:
    """Clustered vectors and a coarse code: recall@10 falls by half from 4 000 to 32 000 vectors."""
    centres = RNG.standard_normal((20, 16))
    vectors = (centres[RNG.integers(0, 20, 33_000)] + 0.5 * RNG.standard_normal((33_000, 16))).astype(np.float32)
    base, queries = vectors[:32_000], vectors[32_000:]
    index = faiss.index_factory(16, "PQ4x6np")
    index.train(base[:16_384])
    (large, _), (small, halves) = (measured(index, base[:rows], queries) for rows in (32_000, 4_000))
    assert small[10] > 1.5 * large[10]
    for k in (10, 100):
        assert expected(small, halves, k, 8.0, 1000) == pytest.approx(large[k], abs=0.03)


def test_expected_at_the_edge_of_clusters() -> None:
    """Clusters of 100 vectors: their edge is at k 100, and a third of the base shows it blurred."""
    centres = 3 * RNG.standard_normal((300, 16))
    vectors = (centres[np.repeat(np.arange(300), 104)] + 0.3 * RNG.standard_normal((31_200, 16))).astype(np.float32)
    vectors = vectors[RNG.permutation(len(vectors))]
    base, queries = vectors[:30_000], vectors[30_000:]
    index = faiss.index_factory(16, "PQ4x6np")
    index.train(base[:16_384])
    (large, _), (small, halves) = (measured(index, base[:rows], queries) for rows in (30_000, 10_000))
    without, with_halves = (expected(small, known, 100, 3.0, len(queries)) for known in ({}, halves))
    assert large[100] - without > 0.04
    assert abs(large[100] - with_halves) < 0.6 * (large[100] - without)
