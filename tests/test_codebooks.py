# SPDX-License-Identifier: Apache-2.0
"""Codebooks: taken out of blobs, compared, and replayed through faiss's own training."""

from __future__ import annotations

from dataclasses import replace

import faiss
import numpy as np
import pytest

from tests.publish_cases import CASES, DIMENSION
from transforms import faiss_training
from transforms.codebooks import Codebooks, difference, distances, round_to_bytes
from transforms.errors import RequestError, TrainingError

VERSION = "3.6.0"
REPLAYED = ["IVF-Flat", "IVF-SQfp16", "HNSW-PQ", "byte", "binary", "cosine"]


def codebooks_of(name: str, seed: int = 7) -> Codebooks:
    case = CASES[name]
    return Codebooks.of(faiss_training.train(case.vectors(seed=seed), case.request(VERSION), threads=1))


@pytest.mark.parametrize(
    ("name", "kind", "coarse", "codewords"),
    [
        ("IVF-Flat", "IndexIVFFlat", (8, DIMENSION), None),
        ("IVF-PQ", "IndexIVFPQ", (8, DIMENSION), (4, 16, 4)),
        ("HNSW-PQ", "IndexHNSWPQ", None, (4, 256, 4)),
        ("byte", "IndexIVFScalarQuantizer", (8, DIMENSION), None),
        ("binary", "IndexBinaryIVF", (8, DIMENSION // 8), None),
    ],
)
def test_shapes(name: str, kind: str, coarse: tuple[int, ...] | None, codewords: tuple[int, ...] | None) -> None:
    found = codebooks_of(name)
    shapes = [None if part is None else part.shape for part in (found.coarse, found.codewords)]
    assert (found.kind, *shapes) == (kind, coarse, codewords)


@pytest.mark.parametrize("name", REPLAYED)
def test_training_on_the_replay_vectors_gives_the_codebooks_again(name: str) -> None:
    case, wanted = CASES[name], codebooks_of(name)
    vectors = wanted.replay_vectors(case.data_type)
    assert len(vectors) == (256 if name == "HNSW-PQ" else 8)
    index = faiss_training.new_index(case.request(VERSION))  # trained by faiss alone: the cluster does not normalise
    if case.data_type == "binary":
        index.train(vectors)
        again = Codebooks.of(faiss.serialize_index_binary(index).tobytes())
    else:
        index.train(vectors.astype(np.float32))
        again = Codebooks.of(faiss.serialize_index(index).tobytes())
    if name == "byte":
        assert wanted.coarse is not None
        wanted = replace(wanted, coarse=round_to_bytes(wanted.coarse).astype(np.float32))
    assert difference(wanted, again) is None


def test_the_order_of_codewords_is_no_difference() -> None:
    """The plugin's library permutes them (polysemous training), which ours and the bridge do not."""
    wanted = codebooks_of("HNSW-PQ")
    assert wanted.codewords is not None
    permuted = np.stack([part[np.random.default_rng(m).permutation(256)] for m, part in enumerate(wanted.codewords)])
    assert difference(wanted, replace(wanted, codewords=permuted)) is None


def test_replay_survives_polysemous_training() -> None:
    vectors = np.random.default_rng(1).standard_normal((256, 4), np.float32)
    index = faiss.index_factory(4, "HNSW4,PQ1")  # one sub-quantizer: the permutation takes seconds for each
    index.train(vectors)
    found = Codebooks.of(faiss.serialize_index(index).tobytes())
    assert found.codewords is not None
    assert difference(replace(found, codewords=vectors[None]), found) is None
    assert not np.array_equal(found.codewords[0], vectors)


def test_differences_are_named() -> None:
    wanted = codebooks_of("IVF-PQ")
    assert wanted.coarse is not None
    assert wanted.codewords is not None
    coarse, codewords = wanted.coarse.copy(), wanted.codewords.copy()
    coarse[3, 0] = np.nextafter(coarse[3, 0], np.float32(9))
    codewords[2, :5] = 0
    assert difference(wanted, replace(wanted, coarse=coarse)) == "1 of 8 centroids differ"
    assert difference(wanted, replace(wanted, codewords=codewords)) == "5 of 16 codewords of sub-quantizer 2 differ"
    assert difference(wanted, replace(wanted, metric="innerproduct")) == "metric innerproduct, expected l2"
    assert difference(wanted, codebooks_of("HNSW-PQ")) == "kind IndexHNSWPQ, expected IndexIVFPQ"
    fewer = replace(wanted, coarse=coarse[:4])
    assert difference(wanted, fewer) == "centroids of shape (4, 16), expected (8, 16)"


def test_repeated_rows_are_counted() -> None:
    wanted = codebooks_of("IVF-Flat")
    assert wanted.coarse is not None
    doubled = wanted.coarse.copy()
    doubled[1] = doubled[0]
    assert difference(wanted, replace(wanted, coarse=doubled)) == "1 of 8 centroids differ"


@pytest.mark.parametrize("name", ["IVF-PQ", "HNSW-PQ", "binary"])
def test_distances(name: str) -> None:
    one, two = codebooks_of(name), codebooks_of(name, seed=8)
    assert set(distances(one, one).values()) == {0.0}
    assert all(0.05 < value < 2 for value in distances(one, two).values())


def test_an_ivf_pq_has_no_replay() -> None:
    with pytest.raises(RequestError, match="cannot be replayed"):
        codebooks_of("IVF-PQ").replay_vectors("float")


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"nonsense", "not a faiss index"),
        (faiss.serialize_index(faiss.IndexFlatL2(4)).tobytes(), "IndexFlatL2, which no k-NN model is"),
        (faiss.serialize_index_binary(faiss.IndexBinaryFlat(8)).tobytes(), "IndexBinaryFlat, which no k-NN model is"),
    ],
)
def test_other_blobs_are_refused(blob: bytes, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Codebooks.of(blob)
