# SPDX-License-Identifier: Apache-2.0
"""Pages made here byte by byte, good and bad."""

from __future__ import annotations

import json

import cbor2
import numpy as np
import pytest

from transforms.opensearch import decoding
from transforms.opensearch.decoding import ORDINALS, decode_cbor, decode_json
from transforms.opensearch.session import PartialResult

FLOAT = np.dtype("<f4")
HEALTHY = {"total": 1, "successful": 1, "skipped": 0, "failed": 0}


def indefinite(pairs):
    """A map as OpenSearch writes it: open-ended."""
    return b"\xbf" + b"".join(cbor2.dumps(name) + value for name, value in pairs) + b"\xff"


def array(items):
    return b"\x9f" + b"".join(items) + b"\xff"


def float32(value):
    return b"\xfa" + np.array(value, ">f4").tobytes()


def cbor_hit(row, score, vector, index="an-index", key="v"):
    fields = indefinite([(key, array([cbor2.dumps(vector.tobytes())]))]) if vector is not None else indefinite([])
    parts = [("_index", cbor2.dumps(index)), ("_score", float32(score)), ("fields", fields)]
    return indefinite([*parts, ("sort", array([cbor2.dumps(row)]))])


def cbor_page(hits, shards=HEALTHY, timed_out=False):
    inner = indefinite([("max_score", float32(0.9)), ("hits", array(hits))])
    parts = [("pit_id", cbor2.dumps("abc")), ("took", cbor2.dumps(3)), ("timed_out", cbor2.dumps(timed_out))]
    return indefinite([*parts, ("_shards", cbor2.dumps(shards)), ("hits", inner)])


def sample(rows, columns=3, seed=0):
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, 1 << 24, len(rows))
    return draws, rng.standard_normal((len(rows), columns)).astype(FLOAT)


#: Around every place where a CBOR integer gets longer.
ROWS = [0, 1, 23, 24, 255, 256, 65535, 65536, 65537, 2**32 - 1, 2**32, 2**40]


@pytest.mark.parametrize("rows", [ROWS, [7], list(range(100)), []])
def test_cbor_pages_give_rows_draws_and_vectors_without_the_slow_path(rows, monkeypatch):
    monkeypatch.setattr(decoding, "_decode_unusual", None)
    draws, matrix = sample(rows)
    hits = [cbor_hit(*hit) for hit in zip(rows, draws / 2**24, matrix, strict=True)]
    page = decode_cbor(cbor_page(hits), "v", 3, FLOAT)
    assert page.rows.tolist() == rows
    assert page.draws.tolist() == draws.tolist()
    assert page.vectors.tobytes() == matrix.tobytes()
    assert (page.hits, page.last, page.pit_id) == (len(rows), rows[-1] if rows else -1, "abc")
    assert page.bad == []


@pytest.mark.parametrize("columns", [1, 5, 6, 63, 64, 16384])
def test_every_length_of_byte_string_head(columns):
    _, matrix = sample([5, 6], columns)
    hits = [cbor_hit(row, 0.5, vector, index="a" * 200) for row, vector in zip([5, 6], matrix, strict=True)]
    assert decode_cbor(cbor_page(hits), "v", columns, FLOAT).vectors.tobytes() == matrix.tobytes()


def test_vectors_full_of_structure_bytes_do_not_mislead():
    evil = np.frombuffer((b"\xff\xff\x64sort\x9f\x01\xff\xff\x66_score\xfadhits\x9f" * 9)[:128], np.uint8)
    hits = [cbor_hit(row, 0.25, evil) for row in (3, 4)]
    page = decode_cbor(cbor_page(hits), "v", 128, np.dtype("u1"))
    assert page.rows.tolist() == [3, 4]
    assert page.vectors.tobytes() == evil.tobytes() * 2


def test_vectors_that_are_missing_short_or_not_finite_are_named():
    good = np.ones(3, FLOAT)
    hits = [cbor_hit(1, 0.1, good), cbor_hit(2, 0.1, good[:2]), cbor_hit(3, 0.1, None), cbor_hit(4, 0.1, good)]
    hits.append(cbor_hit(9, 0.1, np.array([1, np.nan, 1], FLOAT)))
    page = decode_cbor(cbor_page(hits), "v", 3, FLOAT)
    assert page.rows.tolist() == [1, 4]
    assert sorted(page.bad) == [(2, "length 2, expected 3"), (3, "no bytes in v"), (9, "holds NaN or infinity")]
    assert (page.hits, page.last) == (5, 9)


def test_not_finite_in_a_page_that_is_otherwise_usual():
    hits = [cbor_hit(row, 0.1, np.array([1, value, 1], FLOAT)) for row, value in ((1, 1), (2, np.inf), (3, 1))]
    page = decode_cbor(cbor_page(hits), "v", 3, FLOAT)
    assert page.rows.tolist() == [1, 3]
    assert page.bad == [(2, "holds NaN or infinity")]
    assert page.hits == 3


def test_a_page_cut_anywhere_is_an_error_and_never_a_shorter_page():
    draws, matrix = sample(ROWS)
    whole = cbor_page([cbor_hit(*hit) for hit in zip(ROWS, draws / 2**24, matrix, strict=True)])
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            decode_cbor(whole[:end], "v", 3, FLOAT)


@pytest.mark.parametrize("timed_out", [True, False])
def test_an_answer_of_some_shards_only_is_refused(timed_out):
    failed = HEALTHY if timed_out else {**HEALTHY, "failed": 1, "failures": [{"reason": {"reason": "disk on fire"}}]}
    words = "timed out" if timed_out else "1 of 1 shards failed: disk on fire"
    with pytest.raises(PartialResult, match=words):
        decode_cbor(cbor_page([], failed, timed_out), "v", 3, FLOAT)
    text = json.dumps({"timed_out": timed_out, "_shards": failed, "hits": {"hits": []}}).encode()
    with pytest.raises(PartialResult, match=words):
        decode_json(text, "v", 3, FLOAT, False)


def json_page(*sources):
    hits = [{"_id": "x", "_score": 0.59556836, "_source": one, "sort": [row]} for row, one in enumerate(sources)]
    return json.dumps({"pit_id": "abc", "timed_out": False, "_shards": HEALTHY, "hits": {"hits": hits}}).encode()


def test_json_paths_are_found_however_a_document_writes_them():
    wanted = [1.5, 2, 0.1]
    forms = [
        {"a": {"b": {"v": wanted}}},
        {"a.b.v": wanted},
        {"a": {"b.v": wanted}},
        {"a.b": {"v": wanted}},
        {"a": [{"b": {"v": wanted}}]},
    ]
    page = decode_json(json_page(*forms), "a.b.v", 3, FLOAT, False)
    assert page.bad == []
    assert page.vectors.tolist() == [np.array(wanted, FLOAT).tolist()] * 5
    # The score's digits are rounded; the draw is exact.
    assert page.draws.tolist() == [9991979] * 5
    assert np.float32(9991979 / 2**24) == np.float32(0.59556836)
    assert page.pit_id == "abc"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], "length 2, expected 3"),
        ([1, 2, 3, 4], "length 4, expected 3"),
        ([1, None, 3], "not an array of numbers"),
        ([1, "2", 3], "not an array of numbers"),
        (None, "no array of numbers in _source"),
        ("AAAA", "no array of numbers in _source"),
        ([1, 1e300, 3], "holds NaN or infinity"),
    ],
)
def test_json_vectors_that_cannot_be_used_are_named(value, reason):
    page = decode_json(json_page({"v": [1, 2, 3]}, {"v": value}), "v", 3, FLOAT, False)
    assert page.bad == [(1, reason)]
    assert page.rows.tolist() == [0]
    assert (page.hits, page.last) == (2, 1)


def test_json_bytes_and_packed_bits():
    assert decode_json(json_page({"v": [-128, 127]}), "v", 2, np.dtype("i1"), False).vectors.tolist() == [[-128, 127]]
    assert decode_json(json_page({"v": [-1, 5]}), "v", 2, np.dtype("u1"), False).vectors.tolist() == [[255, 5]]
    for value in ([1, 128], [1.5, 1]):
        (bad,) = decode_json(json_page({"v": value}), "v", 2, np.dtype("i1"), False).bad
        assert bad == (0, "values that are not integers from -128 to 127")


def test_nested_objects_are_vectors_of_their_own():
    page = decode_json(
        json_page({"p": [{"v": [1, 2]}, {"x": 1}, {"v": [3, 4]}]}, {"p": {"v": [5, 6]}}), "p.v", 2, FLOAT, True
    )
    assert page.vectors.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert page.rows.tolist() == [0, 1, ORDINALS]
    assert page.hits == 2
