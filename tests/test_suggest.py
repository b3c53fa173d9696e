# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from transforms.errors import TrainingError
from transforms.gate import LeastRecall
from transforms.memory import index_memory
from transforms.request import TrainingRequest
from transforms.suggest import Trial, best, candidates, ready


def request(dimension: int = 64, **fields: object) -> TrainingRequest:
    method = {"name": "ivf", "engine": "faiss", "parameters": {"nlist": 100}}
    body = {"training_index": "i", "training_field": "f", "dimension": dimension, **fields}
    return TrainingRequest.from_fields({"method": method, **body})


def names(count: int, wanted: TrainingRequest) -> list[str]:
    return [candidate.index_description for candidate in candidates(wanted, count)]


def test_candidates_are_the_own_method_and_codes_of_several_sizes() -> None:
    assert names(1_000_000, request()) == [
        "IVF100,Flat",
        "IVF2048,Flat",
        "IVF2048,SQfp16",
        "IVF2048,PQ32x8",
        "IVF2048,PQ16x8",
        "IVF2048,PQ8x8",
        "IVF2048,PQ4x8",
    ]


def test_candidates_can_be_trained_on_what_there_is() -> None:
    assert names(2_000, request())[1] == "IVF32,Flat"
    assert names(200, request(dimension=7)) == ["IVF100,Flat", "IVF4,Flat", "IVF4,SQfp16"]  # too few for 256 codewords
    few = request(max_training_vector_count=200)
    assert names(10_000, few) == ["IVF100,Flat", "IVF4,Flat", "IVF4,SQfp16"]
    assert names(10_000, request(dimension=7))[3:] == ["IVF256,PQ7x8", "IVF256,PQ1x8"]
    assert all(int(name[3:].partition(",")[0]) < 20_000 for name in names(10**10, request()))


def test_candidates_of_bytes_and_bits_have_no_codes() -> None:
    assert names(10_000, request(data_type="byte"))[1:] == ["IVF256,SQ8_direct_signed"]
    assert names(10_000, request(data_type="binary", space_type="hamming"))[1:] == ["BIVF256,Flat"]


def test_candidates_for_an_older_version_are_in_its_words() -> None:
    method = {"name": "ivf", "engine": "faiss", "parameters": {"nlist": 100}}
    body = {"training_index": "i", "training_field": "f", "dimension": 64, "method": method}
    old = TrainingRequest.from_fields(body, target_version="2.19.1")
    assert "IVF256,SQfp16" in names(20_000, old)


def trial(name: str, *recall: tuple[int, float], count: int = 10_000) -> Trial:
    wanted = next(each for each in candidates(request(), count) if each.index_description == name)
    rows = [{"nprobes": nprobes, "expected": {"10": share, "100": share}} for nprobes, share in recall]
    return Trial(wanted, {"recall": rows, "memory": index_memory(wanted, count)}, 1.0)


FLAT = trial("IVF256,Flat", (1, 0.6), (4, 0.9), (16, 0.991), (64, 1.0))
FINE = trial("IVF256,PQ32x8", (1, 0.55), (4, 0.8), (16, 0.895), (64, 0.9))
ROUGH = trial("IVF256,PQ8x8", (1, 0.4), (4, 0.5), (16, 0.5))
TRIALS = [FLAT, FINE, ROUGH]


def test_the_smallest_that_reaches_a_recall() -> None:
    least = LeastRecall(0.85, 10)
    assert best(TRIALS, least, None) is FINE
    assert ready(FINE, least)["method"]["parameters"]["nprobes"] == 16
    assert best(TRIALS, LeastRecall(0.45, 10), None) is ROUGH
    assert ready(ROUGH, LeastRecall(0.45, 10))["method"]["parameters"]["nprobes"] == 4
    assert best(TRIALS, LeastRecall(0.99, 10), None) is FLAT


def test_the_best_within_a_size() -> None:
    assert best(TRIALS, None, 1_000) is FLAT
    assert best(TRIALS, None, 70) is FINE
    assert ready(FINE, None)["method"]["parameters"]["nprobes"] == 16  # 64 would add less than 0.01


def test_what_cannot_be_had_is_said_with_what_comes_nearest() -> None:
    with pytest.raises(TrainingError, match=r"min_recall is 0.95@10, but the best, IVF256,PQ32x8, reaches 0.900"):
        best(TRIALS, LeastRecall(0.95, 10), 70)
    with pytest.raises(TrainingError, match=r"max_bytes_per_vector is 20, but the smallest, IVF256,PQ8x8, takes 35.2"):
        best(TRIALS, None, 20)
    with pytest.raises(TrainingError, match="nothing could be trained: no memory"):
        best([Trial(FLAT.request, None, error="no memory")], None, 20)


def test_a_recall_that_could_not_be_measured() -> None:
    rows = [{"nprobes": 1, "expected": {"10": 0.9}}]
    few = Trial(FLAT.request, {**FLAT.quality, "recall": rows})  # type: ignore[dict-item]
    assert few.row(LeastRecall(0.5, 100)) == rows[0]
    assert best([few], LeastRecall(0.5, 10), None) == few
    with pytest.raises(TrainingError, match="about recall@100, but there are too few vectors to measure it"):
        best([few], LeastRecall(0.5, 100), None)


@pytest.mark.parametrize(("chosen", "level"), [(FLAT, "1x"), (FINE, "8x"), (ROUGH, "32x")])
def test_the_request_is_ready_to_train(chosen: Trial, level: str) -> None:
    body = ready(chosen, None)
    assert body["compression_level"] == level
    again = TrainingRequest.from_fields(body)
    assert again.index_description == chosen.request.index_description
    assert again.compression_level == level


def test_a_level_that_the_api_does_not_take_is_left_to_the_encoder() -> None:
    body = ready(trial("IVF256,PQ4x8", (1, 0.1)), None)
    assert "compression_level" not in body
    assert TrainingRequest.from_fields(body).compression_level == "64x"
