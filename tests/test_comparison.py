# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from transforms.comparison import Previous, check_comparable, own_error, parse_gain
from transforms.errors import RequestError
from transforms.model import CREATED, metadata
from transforms.request import TrainingRequest

PQ = {"name": "pq", "parameters": {"m": 4, "code_size": 5}}


def request(encoder: dict | None = None, nlist: int = 12, **fields: object) -> TrainingRequest:
    parameters = {"nlist": nlist, **({"encoder": encoder} if encoder else {})}
    body = {"training_index": "i", "training_field": "f", "dimension": 16, **fields}
    return TrainingRequest.from_fields({**body, "method": {"name": "ivf", "engine": "faiss", "parameters": parameters}})


def binary(bits: int) -> dict:
    return {"name": "binary", "parameters": {"bits": bits}}


@pytest.mark.parametrize(("text", "gain"), [("2%", 0.02), ("0.02", 0.02), ("0", 0.0), ("12.5%", 0.125)])
def test_gains(text: str, gain: float) -> None:
    assert parse_gain(text) == pytest.approx(gain)


@pytest.mark.parametrize("text", ["2", "100%", "-1%", "two", "", "%"])
def test_bad_gains(text: str) -> None:
    with pytest.raises(RequestError, match=r"expected a share below 1, as 2% or 0\.02"):
        parse_gain(text)


def test_the_old_model_is_kept_unless_the_new_one_is_better_by_as_much() -> None:
    previous = Previous("old", "/x", None, 0.02)
    assert previous.kept(100.0, 97.0) is None
    kept = previous.kept(100.0, 99.0)
    assert (
        kept
        == 'model "old" is kept: its error is 100, that of a new model 99, 1.0% smaller, and only_if_better is 0.02'
    )
    assert Previous("old", "/x").kept(100.0, 200.0) is None  # compared only


def test_nothing_is_trained_where_the_old_model_is_as_good_as_it_was() -> None:
    previous = Previous("old", "/x", 100.0, 0.02)
    assert "1.0% larger than when it was trained" in (previous.still_good(101.0) or "")
    assert "nothing was trained" in (previous.still_good(90.0) or "")
    assert previous.still_good(103.0) is None
    assert Previous("old", "/x", None, 0.02).still_good(1.0) is None
    assert Previous("old", "/x", 100.0, None).still_good(1.0) is None


def test_an_error_that_is_no_number_keeps_no_old_model() -> None:
    previous = Previous("old", "/x", 100.0, 0.02)
    assert previous.still_good(float("nan")) is None
    assert previous.kept(100.0, float("nan")) is None


def test_the_error_of_its_time_counts_for_the_same_request_only() -> None:
    measured = {"error": {"compared_by": "total", "held_out": {"coarse": 3.0, "total": 1.5}}}
    old = {"model_id": "old", **metadata(request(PQ), CREATED), "quality": measured}
    assert own_error(old, metadata(request(PQ), CREATED)) == 1.5
    assert own_error(old, metadata(request(PQ, nlist=13), CREATED)) is None
    assert own_error({**old, "quality": {}}, metadata(request(PQ), CREATED)) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (request(), "has encoder pq, this request flat"),
        (request(PQ, space_type="innerproduct"), "has space_type l2, this request innerproduct"),
        (request(binary(2)), "has encoder pq, this request binary of 2 bits"),
    ],
)
def test_errors_that_measure_different_things_are_not_compared(other: TrainingRequest, message: str) -> None:
    old = {"model_id": "old", **metadata(request(PQ), CREATED)}
    check_comparable(old, request(PQ, nlist=99))
    with pytest.raises(RequestError, match=message):
        check_comparable(old, other)


def test_errors_in_different_bits_are_not_compared() -> None:
    old = {"model_id": "old", **metadata(request(binary(1)), CREATED)}
    check_comparable(old, request({"name": "binary"}))
    with pytest.raises(RequestError, match="has encoder binary of 1 bits, this request binary of 2 bits"):
        check_comparable(old, request(binary(2)))
