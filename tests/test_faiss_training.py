# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from typing import Any

import faiss
import numpy as np
import pytest

from transforms import faiss_training, quantization
from transforms.errors import TrainingError
from transforms.memory import training_memory
from transforms.request import TrainingRequest

D = 16
RNG = np.random.default_rng(3)
CENTRES = RNG.standard_normal((40, D))
FLOATS = (CENTRES[RNG.integers(0, 40, 6_000)] + 0.3 * RNG.standard_normal((6_000, D))).astype(np.float32)
BYTES = np.clip(FLOATS * 30, -128, 127).astype(np.int8)
BITS = np.packbits(FLOATS > 0, axis=1)


def request(
    method: str = "ivf", parameters: dict | None = None, encoder: dict | None = None, **fields: Any
) -> TrainingRequest:
    own = dict(parameters or ({"nlist": 12, "nprobes": 3} if method == "ivf" else {}))
    if encoder:
        own["encoder"] = encoder
    body = {"training_index": "i", "training_field": "f", "dimension": D, **fields}
    return TrainingRequest.from_fields({**body, "method": {"name": method, "engine": "faiss", "parameters": own}})


PQ = {"name": "pq", "parameters": {"m": 4, "code_size": 5}}
HNSW_PQ = {"name": "pq", "parameters": {"m": 4, "code_size": 8}}
FP16 = {"name": "sq", "parameters": {"bits": 16}}

CASES = {
    "IVF flat l2": (request(), FLOATS, "IVF12,Flat"),
    "IVF flat innerproduct": (request(space_type="innerproduct"), FLOATS, "IVF12,Flat"),
    "IVF flat cosinesimil": (request(space_type="cosinesimil"), FLOATS, "IVF12,Flat"),
    "IVF PQ l2": (request(encoder=PQ), FLOATS, "IVF12,PQ4x5np"),
    "IVF PQ innerproduct": (request(encoder=PQ, space_type="innerproduct"), FLOATS, "IVF12,PQ4x5np"),
    "IVF PQ cosinesimil": (request(encoder=PQ, space_type="cosinesimil"), FLOATS, "IVF12,PQ4x5np"),
    "IVF SQ fp16": (request(encoder=FP16), FLOATS, "IVF12,SQfp16"),
    "IVF byte": (request(data_type="byte"), BYTES, "IVF12,SQ8_direct_signed"),
    "HNSW PQ l2": (request("hnsw", {}, HNSW_PQ), FLOATS, "HNSW16,PQ4np"),
    "HNSW PQ innerproduct": (request("hnsw", {}, HNSW_PQ, space_type="innerproduct"), FLOATS, "HNSW16,PQ4np"),
}


def as_the_plugin_does(
    vectors: np.ndarray, wanted: TrainingRequest, factory: str, niter: int | None = None, nredo: int = 1
) -> bytes:
    """`TrainIndex` of the plugin's faiss_wrapper.cpp, step by step, on vectors normalised first for cosine.

    Not the plugin's: `niter` and `nredo`, of all its k-means.
    """
    matrix = vectors.astype(np.float32)
    if wanted.space_type == "cosinesimil":
        faiss.normalize_L2(matrix)
    metric = faiss.METRIC_L2 if wanted.space_type == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(D, factory, metric)
    index.metric_type = metric
    if isinstance(index, faiss.IndexHNSWPQ):
        index.storage.metric_type = metric
        index.hnsw.efConstruction, index.hnsw.efSearch = wanted.ef_construction, wanted.ef_search
    else:
        index.nprobe = wanted.nprobes
        index.make_direct_map()
    quantizer = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    for part in (index, getattr(quantizer, "pq", None)):
        if hasattr(part, "cp"):
            part.cp.niter, part.cp.nredo = niter or part.cp.niter, nredo
    index.train(matrix)
    return faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize(("wanted", "vectors", "factory"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_blob_is_that_of_faiss_bit_for_bit(
    wanted: TrainingRequest, vectors: np.ndarray, factory: str, threads: int
) -> None:
    blob = faiss_training.train(vectors.copy(), wanted, threads)
    assert blob == as_the_plugin_does(vectors, wanted, factory)
    assert len(blob) == wanted.blob_bytes
    faiss_training.check(blob, wanted, vectors[:10])


@pytest.mark.parametrize(("wanted", "vectors", "factory"), CASES.values(), ids=CASES)
def test_iterations_and_restarts_are_those_of_faiss(wanted: TrainingRequest, vectors: np.ndarray, factory: str) -> None:
    blob = faiss_training.train(vectors.copy(), wanted, 2, niter=3, nredo=2)
    assert blob == as_the_plugin_does(vectors, wanted, factory, 3, 2)
    assert blob != as_the_plugin_does(vectors, wanted, factory)


def test_iterations_of_binary_vectors() -> None:
    wanted = request(data_type="binary", space_type="hamming")
    few, more = (faiss_training.train(BITS.copy(), wanted, 1, niter=niter) for niter in (1, 10))
    assert few != more
    assert more == faiss_training.train(BITS.copy(), wanted, 1)


def test_more_vectors_than_faiss_uses_give_faiss_s_own_subset() -> None:
    wanted = request(
        parameters={"nlist": 2, "nprobes": 1}, encoder={"name": "pq", "parameters": {"m": 2, "code_size": 4}}
    )
    assert len(FLOATS) > wanted.usable_vectors
    assert faiss_training.train(FLOATS.copy(), wanted, 2) == as_the_plugin_does(FLOATS, wanted, "IVF2,PQ2x4np")


def test_polysemous_training_would_only_permute_the_codewords() -> None:
    wanted = request(encoder=PQ)
    ours = faiss.deserialize_index(np.frombuffer(faiss_training.train(FLOATS.copy(), wanted, 2), np.uint8))
    theirs = faiss.deserialize_index(np.frombuffer(as_the_plugin_does(FLOATS, wanted, "IVF12,PQ4x5"), np.uint8))
    ours.add(FLOATS)
    theirs.add(FLOATS)
    for a, b in zip(ours.search(FLOATS[:200], 5), theirs.search(FLOATS[:200], 5), strict=True):
        assert np.array_equal(a, b)


def test_layout_of_an_ivf_flat_blob() -> None:
    # facts of the format: fourcc, d, ntotal, two dummies, is_trained, metric, nlist, nprobe
    blob = faiss_training.train(FLOATS.copy(), request(), 1)
    fourcc, d, ntotal, _, _, trained, metric, nlist, nprobe = struct.unpack_from("<4siqqqBiQQ", blob)
    assert (fourcc, d, ntotal, trained, metric, nlist, nprobe) == (b"IwFl", D, 0, 1, 1, 12, 3)
    direct_map = 4 + 33 + 16 + (4 + 33 + 8 + 4 * 12 * D)
    assert struct.unpack_from("<BQ", blob, direct_map) == (1, 0)  # an empty array, which Python's faiss does not make


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_binary_encoder_trains_on_quantised_bits(bits: int) -> None:
    wanted = request(encoder={"name": "binary", "parameters": {"bits": bits}})
    blob = faiss_training.train(FLOATS.copy(), wanted, 2)
    index = faiss.deserialize_index_binary(np.frombuffer(blob, np.uint8))
    assert (type(index).__name__, index.d, index.nlist, index.ntotal) == ("IndexBinaryIVF", bits * D, 12, 0)
    faiss_training.check(blob, wanted, FLOATS[:10])
    expected = faiss.index_binary_factory(bits * D, "BIVF12")
    expected.make_direct_map()
    expected.train(quantization.pack(FLOATS, quantization.thresholds(FLOATS, bits)))
    assert blob == faiss.serialize_index_binary(expected).tobytes()


def test_binary_vectors() -> None:
    wanted = request(data_type="binary", space_type="hamming")
    blob = faiss_training.train(BITS.copy(), wanted, 2)
    assert len(blob) == wanted.blob_bytes
    faiss_training.check(blob, wanted, BITS[:10])
    assert faiss.deserialize_index_binary(np.frombuffer(blob, np.uint8)).d == D


def test_quantised_bits_are_the_plugin_s() -> None:
    # MultiBitScalarQuantizer and BitPacker, written out: bit i of dimension j is number i * d + j, the highest first.
    vectors = FLOATS[:50, :5]
    for bits in (1, 2, 4):
        limits = quantization.thresholds(vectors, bits)
        mean, deviation = vectors.astype(float).mean(0), vectors.astype(float).std(0)
        packed = quantization.pack(vectors, limits)
        assert packed.shape == (50, -(-bits * 5 // 8))
        for b in range(bits):
            assert np.allclose(limits[b], mean + (-1 + 2 * (b + 1) / (bits + 1)) * deviation, atol=1e-6)
            for j in range(5):
                place = b * 5 + j
                found = (packed[:, place >> 3] >> (7 - (place & 7))) & 1
                assert np.array_equal(found, vectors[:, j] > limits[b, j])


def test_cosine_codebook_is_of_unit_length_and_codes_unit_vectors_better() -> None:
    wanted = request(space_type="cosinesimil", encoder=PQ)
    lengths = np.exp(np.random.default_rng(0).normal(3, 0.5, (len(FLOATS), 1))).astype(np.float32)
    raw = FLOATS * lengths
    index = faiss.deserialize_index(np.frombuffer(faiss_training.train(raw.copy(), wanted, 2), np.uint8))
    centroids = index.quantizer.reconstruct_n(0, 12)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    unnormalised = faiss.index_factory(D, "IVF12,PQ4x5np", faiss.METRIC_INNER_PRODUCT)
    unnormalised.train(raw)
    base = raw / np.linalg.norm(raw, axis=1, keepdims=True)

    def error(own: faiss.Index) -> float:
        return float(((own.sa_decode(own.sa_encode(base)) - base) ** 2).sum(axis=1).mean())

    assert error(index) < 0.1 * error(unnormalised)


def test_progress_counts_iterations_and_sub_quantizers() -> None:
    seen: list[tuple[str, int, int]] = []
    faiss_training.train(FLOATS.copy(), request(encoder=PQ), 2, lambda *step: seen.append(step))
    assert ("k-means", 10, 10) in seen
    assert [step for step in seen if step[0] == "sub-quantizers"] == [("sub-quantizers", m, 4) for m in (1, 2, 3, 4)]
    iterations = [done for stage, done, _ in seen if stage == "k-means"]
    assert iterations == sorted(iterations)


@pytest.mark.parametrize(
    ("wanted", "count", "message"),
    [
        (
            request(),
            5,
            r"IVF12,Flat: Number of training points \(5\) should be at least as large as number of clusters \(12\)",
        ),
        (
            request("hnsw", {}, HNSW_PQ),
            100,
            r"HNSW16,PQ4: Number of training points \(100\) should be at least .* \(256\)",
        ),
    ],
)
def test_faiss_errors_lose_their_c_plus_plus(wanted: TrainingRequest, count: int, message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        faiss_training.train(FLOATS[:count].copy(), wanted, 1)
    assert "faiss::" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_vectors_that_are_not_finite_are_refused() -> None:
    bad = FLOATS.copy()
    bad[17, 3] = np.nan
    with pytest.raises(TrainingError, match="NaN"):
        faiss_training.train(bad, request(), 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (request(parameters={"nlist": 13, "nprobes": 3}), "nlist 12, expected 13"),
        (request(parameters={"nlist": 12, "nprobes": 4}), "nprobes 3, expected 4"),
        (request(space_type="innerproduct"), "metric 1, expected 0"),
        (request(encoder=PQ), "class IndexIVFFlat, expected IndexIVFPQ"),
        (request(dimension=8), "dimension 16, expected 8"),
    ],
)
def test_check_names_what_differs(other: TrainingRequest, message: str) -> None:
    blob = faiss_training.train(FLOATS.copy(), request(), 1)
    with pytest.raises(TrainingError, match=message):
        faiss_training.check(blob, other, FLOATS[:5, : other.dimension])


def test_check_refuses_a_blob_with_vectors_and_one_with_broken_codewords() -> None:
    wanted = request(encoder=PQ)
    index = faiss.deserialize_index(np.frombuffer(faiss_training.train(FLOATS.copy(), wanted, 1), np.uint8))
    faiss.copy_array_to_vector(np.full(4 * 32 * 4, np.nan, np.float32), index.pq.centroids)
    with pytest.raises(TrainingError, match="finite codewords False, expected True"):
        faiss_training.check(faiss.serialize_index(index).tobytes(), wanted, FLOATS[:5])
    full = faiss.deserialize_index(np.frombuffer(faiss_training.train(FLOATS.copy(), wanted, 1), np.uint8))
    full.add(FLOATS[:7])
    with pytest.raises(TrainingError, match="ntotal 7, expected 0"):
        faiss_training.check(faiss.serialize_index(full).tobytes(), wanted, FLOATS[:5])


def test_memory_estimate_counts_what_it_depends_on() -> None:
    count, row = 1_000_000, 4 * D
    flat = training_memory(request(), 2_000)
    assert training_memory(request(), count) >= flat + (count - 2_000) * row
    assert training_memory(request(encoder=PQ), 8_192) >= flat + 8_192 * row  # residuals
    assert training_memory(request(data_type="byte"), count) >= count * 5 * D
