# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import faiss
import numpy as np
import pytest

from transforms import faiss_training, held_out
from transforms.findings import findings
from transforms.gate import Gate, LeastRecall
from transforms.memory import index_memory
from transforms.quality import EVAL_VECTORS, evaluate, hold_out, quantization_error
from transforms.request import TrainingRequest

D = 16
RNG = np.random.default_rng(8)
CENTRES = RNG.standard_normal((40, D))
FLOATS = (CENTRES[RNG.integers(0, 40, 9_000)] + 0.3 * RNG.standard_normal((9_000, D))).astype(np.float32)
TRAINED = 6_000
PQ = {"name": "pq", "parameters": {"m": 4, "code_size": 5}}


def request(
    method: str = "ivf", parameters: dict | None = None, encoder: dict | None = None, **fields: Any
) -> TrainingRequest:
    own = dict(parameters or ({"nlist": 12, "nprobes": 3} if method == "ivf" else {}))
    if encoder:
        own["encoder"] = encoder
    body = {"training_index": "i", "training_field": "f", "dimension": D, **fields}
    return TrainingRequest.from_fields({**body, "method": {"name": method, "engine": "faiss", "parameters": own}})


def measured(
    wanted: TrainingRequest, vectors: np.ndarray = FLOATS, trained: int = TRAINED, corpus: int = 9_000, **more: Any
) -> dict[str, Any]:
    vectors = vectors.copy()
    history: list[dict[str, float]] = []
    blob = faiss_training.train(vectors[:trained], wanted, 2, history=history)
    return evaluate(blob, wanted, vectors, trained, corpus, threads=2, history=history, **more)


KINDS = {
    "flat l2": (request(), FLOATS),
    "flat cosinesimil": (request(space_type="cosinesimil"), FLOATS),
    "pq l2": (request(encoder=PQ), FLOATS),
    "pq innerproduct": (request(encoder=PQ, space_type="innerproduct"), FLOATS),
    "fp16": (request(encoder={"name": "sq", "parameters": {"bits": 16}}), FLOATS),
    "binary encoder": (request(encoder={"name": "binary", "parameters": {"bits": 2}}), FLOATS),
    "byte": (request(data_type="byte"), np.clip(FLOATS * 30, -128, 127).astype(np.int8)),
    "binary": (request(data_type="binary", space_type="hamming"), np.packbits(FLOATS > 0, axis=1)),
    "hnsw pq": (request("hnsw", {}, {"name": "pq", "parameters": {"m": 4, "code_size": 8}}), FLOATS),
}


@pytest.mark.parametrize(("wanted", "vectors"), KINDS.values(), ids=KINDS)
def test_every_kind_of_model_is_measured(wanted: TrainingRequest, vectors: np.ndarray) -> None:
    quality = measured(wanted, vectors)
    assert json.loads(json.dumps(quality)) == quality
    assert quality["vectors"] == {
        "source": 9_000,
        "trained": TRAINED,
        "held_out": 2_728,
        "base": 8_728,
        "queries": 272,
        "queries_held_out": True,
    }
    at = quality["at"]
    assert at.get("nprobes") == wanted.nprobes
    assert at.get("ef_search") == wanted.ef_search
    for kind in ("measured", "expected"):
        assert 0 < at[kind]["10"] <= 1
        assert at[kind]["100"] > 0
    assert set(quality["error"]) >= {"training", "held_out", "compared_by"}
    assert ("lists" in quality) == (wanted.nlist is not None)
    if wanted.nlist is not None:
        assert quality["recall"][0]["nprobes"] == 1
        shares = [row["measured"]["100"] for row in quality["recall"]]
        assert shares[-1] >= shares[0]


@pytest.mark.parametrize(("wanted", "vectors"), KINDS.values(), ids=KINDS)
def test_a_model_compared_with_itself_has_its_own_recall(wanted: TrainingRequest, vectors: np.ndarray) -> None:
    vectors = vectors.copy()
    blob = faiss_training.train(vectors[:TRAINED], wanted, 2)
    quality = evaluate(blob, wanted, vectors, TRAINED, 12_000, threads=2, previous=blob)
    own = {name: value for name, value in quality["at"].items() if name not in ("standard_error", "graph")}
    assert set(quality["previous"]) == set(own)
    for name, value in own.items():
        # faiss builds a graph with several threads, so no two are the same.
        assert quality["previous"][name] == pytest.approx(value, rel=0.05 if wanted.ef_search else 1e-9)


@pytest.mark.parametrize(("wanted", "vectors"), KINDS.values(), ids=KINDS)
def test_every_kind_of_model_shows_drift(wanted: TrainingRequest, vectors: np.ndarray) -> None:
    """Rows are in the order of their first value, which is all that the position says of them."""
    order = np.argsort(vectors[:, 0].astype(np.float32), kind="stable")
    positions = np.empty(len(vectors), np.float32)
    positions[order] = np.linspace(0, 1, len(vectors))
    for trained in (TRAINED, len(vectors)):
        drift = measured(wanted, vectors, trained, positions=positions)["drift"]
        assert drift["explained"] > 0.02
        assert np.mean(drift["error"]) == pytest.approx(1, abs=0.01)
        assert len(drift["position"]) == 20
        raw = trained == TRAINED or not wanted.normalize  # trained rows have become unit vectors
        assert ("length" in drift) == (raw and wanted.data_type != "binary")
    apart = positions[np.random.default_rng(0).permutation(len(positions))]
    assert measured(wanted, vectors, positions=apart)["drift"]["explained"] < 0.005


def test_recall_and_errors_are_those_that_faiss_gives() -> None:
    wanted = request(encoder=PQ)
    blob = faiss_training.train(FLOATS[:TRAINED].copy(), wanted, 2)
    quality = evaluate(blob, wanted, FLOATS.copy(), TRAINED, 9_000)
    base, queries = FLOATS[:-272], FLOATS[-272:]
    index = faiss.deserialize_index(np.frombuffer(blob, np.uint8))
    index.add(base)
    found, true = index.search(queries, 10)[1], faiss.knn(queries, base, 10)[1]
    by_ids = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, true, strict=True)])
    assert quality["at"]["measured"]["10"] == pytest.approx(by_ids, abs=1e-6)
    held_out = base[TRAINED:]
    rebuilt = index.sa_decode(index.sa_encode(held_out))
    total = float(((rebuilt - held_out) ** 2).sum(axis=1).mean())
    assert quality["error"]["held_out"]["total"] == pytest.approx(total, rel=1e-5)
    assert quality["error"]["held_out"]["total"] == pytest.approx(quantization_error(blob, wanted, held_out), rel=1e-5)
    coarse = index.quantizer.search(held_out, 1)[0].mean()
    assert quality["error"]["held_out"]["coarse"] == pytest.approx(float(coarse), rel=1e-4)
    assert sum(part["held_out"] for part in quality["subquantizers"]) == pytest.approx(total, rel=1e-5)
    sizes = np.array([index.invlists.list_size(number) for number in range(12)])
    assert quality["lists"]["imbalance_factor"] == pytest.approx(index.invlists.imbalance_factor(), rel=2e-3)
    assert quality["lists"]["empty"] == int((sizes == 0).sum())
    assert sorted(quality["lists"]["sizes"]["vectors"]) == sorted(sizes.tolist())


@pytest.mark.parametrize("own", [False, True])
def test_a_search_of_all_bits_finds_all_neighbours(own: bool) -> None:
    """Of so few bits many vectors are as far away as the last neighbour; it does not matter which are found."""
    wanted = request(data_type="binary", space_type="hamming")
    vectors = np.packbits(FLOATS > 0, axis=1)
    at = measured(wanted, vectors, len(vectors) if own else TRAINED, nprobes=[12])["recall"][-1]
    assert at["nprobes"] == 12
    assert set(at["measured"].values()) == {1.0}


def test_history_is_that_of_the_restart_that_counts() -> None:
    steps: list[dict[str, float]] = []
    faiss_training.train(FLOATS.copy(), request(), 2, niter=3, nredo=4, history=steps)
    objectives = [step["objective"] for step in steps]
    assert len(objectives) == 3
    assert objectives == sorted(objectives, reverse=True)


def test_history_is_that_of_faiss() -> None:
    steps = measured(request())["history"]
    clustering = faiss.Clustering(D, 12)
    clustering.niter = 10
    clustering.train(FLOATS[:3_072].copy(), faiss.IndexFlatL2(D))
    assert len(steps) == 10
    objectives = [step["objective"] for step in steps]
    assert objectives == sorted(objectives, reverse=True)


def test_without_vectors_to_hold_out_trained_ones_are_queries_but_not_their_own_neighbours() -> None:
    quality = measured(request(parameters={"nlist": 12, "nprobes": 12}), trained=9_000)
    assert quality["vectors"]["queries_held_out"] is False
    assert quality["vectors"]["held_out"] == 0
    assert quality["at"]["measured"] == {"10": 1.0, "100": 1.0}
    assert "held_out" not in quality["error"]
    # A code tells a query from its own copy no better than from a neighbour: with itself it would always find one.
    assert measured(request(encoder=PQ), trained=9_000)["at"]["measured"]["10"] < 0.9


@pytest.mark.parametrize("trained", [9_000, 8_900, 6_000])
def test_the_base_has_its_size_for_any_sample(monkeypatch: pytest.MonkeyPatch, trained: int) -> None:
    monkeypatch.setattr(held_out, "BASE_VALUES", 2_000 * D)
    quality = measured(request(encoder=PQ), trained=trained)
    assert quality["vectors"]["base"] == max(2_000, quality["vectors"]["held_out"])
    assert quality["at"]["expected"]["10"] < quality["at"]["measured"]["10"]  # there are three to four times as many


def test_the_evaluation_normalises_what_the_plugin_normalises() -> None:
    lengths = np.exp(RNG.normal(2, 0.4, (len(FLOATS), 1))).astype(np.float32)
    wanted = request(encoder=PQ, space_type="cosinesimil")
    scaled, unit = measured(wanted, FLOATS * lengths), measured(wanted)
    assert scaled["at"]["measured"]["10"] == pytest.approx(unit["at"]["measured"]["10"], abs=0.01)
    assert scaled["norms"]["held_out"]["mean"] > 5 * unit["norms"]["held_out"]["mean"]
    assert "training" not in scaled["norms"]


def test_what_normalisation_gains_is_tried() -> None:
    lengths = np.exp(RNG.normal(1, 0.5, (len(FLOATS), 1))).astype(np.float32)
    wanted = request(encoder=PQ, space_type="cosinesimil")
    quality = measured(wanted, FLOATS * lengths, trained=4_000)
    assert quality["normalisation"]["gain"] > 2
    assert any("not on unit vectors" in text for text in findings(quality))
    by_default = RNG.standard_normal((hold_out(EVAL_VECTORS), 8)).astype(np.float32)
    default = request(encoder={"name": "pq", "parameters": {"m": 4}}, space_type="cosinesimil", dimension=8)
    assert "normalisation" in measured(default, np.concatenate((by_default, by_default)), len(by_default))
    unit = FLOATS / np.linalg.norm(FLOATS, axis=1, keepdims=True)
    assert "normalisation" not in measured(wanted, unit, trained=4_000)


def test_a_graph_finds_less_with_a_small_ef_search() -> None:
    encoder = {"name": "pq", "parameters": {"m": 8, "code_size": 8}}
    low, high = (measured(request("hnsw", {"ef_search": ef}, encoder), FLOATS)["at"] for ef in (10, 500))
    assert (low["ef_search"], high["ef_search"]) == (10, 500)
    assert low["graph"] < high["graph"] <= 1
    assert low["expected"]["10"] < high["expected"]["10"]


def test_the_sample_is_not_copied_and_the_trained_rows_are_not_touched() -> None:
    vectors = FLOATS.copy()
    wanted = request(encoder=PQ, space_type="cosinesimil")
    blob = faiss_training.train(vectors[:TRAINED], wanted, 2)
    before = vectors[:TRAINED].copy()
    evaluate(blob, wanted, vectors, TRAINED, 9_000)
    assert np.array_equal(vectors[:TRAINED], before)
    assert np.allclose(np.linalg.norm(vectors[TRAINED:], axis=1), 1, atol=1e-5)


def test_unused_codewords_are_counted() -> None:
    vectors = FLOATS.copy()
    vectors[:, 4:8] = 1.0  # the second of four sub-vectors is the same everywhere
    parts = measured(request("hnsw", {}, {"name": "pq", "parameters": {"m": 4, "code_size": 8}}), vectors)[
        "subquantizers"
    ]
    assert parts[1]["unused"] == 255
    assert parts[0]["unused"] == 0
    assert parts[1]["held_out"] == pytest.approx(0, abs=1e-9)


def test_other_nprobes_can_be_asked_for() -> None:
    rows = measured(request(), nprobes=(7,))["recall"]
    assert {1, 2, 3, 4, 7} <= {row["nprobes"] for row in rows}


def test_hold_out_is_a_tenth_more_for_queries() -> None:
    assert (hold_out(10_000), hold_out(0)) == (11_000, 0)


# --- memory: the examples of OpenSearch's documentation ---


@pytest.mark.parametrize(
    ("wanted", "segments", "gigabytes"),
    [
        (request(parameters={"nlist": 128}, dimension=256), 0, 1.126),
        (
            request(
                parameters={"nlist": 512},
                encoder={"name": "pq", "parameters": {"m": 32, "code_size": 8}},
                dimension=256,
            ),
            100,
            0.148,
        ),
        (
            request("hnsw", {"m": 16}, {"name": "pq", "parameters": {"m": 32, "code_size": 8}}, dimension=256),
            100,
            0.231,
        ),
    ],
)
def test_memory_is_what_the_documentation_says(wanted: TrainingRequest, segments: int, gigabytes: float) -> None:
    memory = index_memory(wanted, 1_000_000)
    total = memory["vectors_bytes"] + segments * memory["segment_bytes"]
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.001)


# --- models that are bad on purpose: the gate catches them and says where it is ---


def test_first_vectors_of_a_drifting_source() -> None:
    """What the cluster's own _train does: the oldest vectors, of a source that has moved on since."""
    direction = np.random.default_rng(1).standard_normal((1, D)).astype(np.float32)
    moving = FLOATS + np.linspace(0, 6, len(FLOATS), dtype=np.float32)[:, None] * direction
    wanted = request(parameters={"nlist": 16, "nprobes": 4}, encoder={"name": "pq", "parameters": {"m": 8}})
    shuffled = np.random.default_rng(0).permutation(len(moving))
    first = np.concatenate([np.arange(3_000), shuffled[shuffled >= 3_000]])
    good, bad = (measured(wanted, moving[order], trained=3_000) for order in (shuffled, first))
    gate = Gate(LeastRecall.parse("0.7@10"), 2.0)
    assert gate.failures(good) == []
    recall, imbalance = gate.failures(bad)
    assert recall == f"min_recall is 0.7@10 but recall@10 is {bad['at']['expected']['10']:.3f} with nprobes 4"
    assert "max_imbalance is 2 but the lists have" in imbalance
    assert "they do not stand for the source" in findings(bad)[0]
    assert not any("stand for the source" in text for text in findings(good))


WIDE = request(parameters={"nlist": 64, "nprobes": 1})


def test_too_few_lists_visited() -> None:
    bad = measured(WIDE)
    assert Gate(LeastRecall.parse("0.9@10")).failures(bad) == [
        f"min_recall is 0.9@10 but recall@10 is {bad['at']['expected']['10']:.3f} with nprobes 1"
    ]
    assert Gate(LeastRecall.parse("0.9@10/nprobes=16")).failures(measured(WIDE, nprobes=(16,))) == []
    assert "is in lists that nprobes 1 does not visit" in findings(bad)[0]


def test_wrong_m() -> None:
    bad = measured(request(parameters={"nlist": 12, "nprobes": 12}, encoder={"name": "pq", "parameters": {"m": 1}}))
    assert Gate(LeastRecall.parse("0.5@10")).failures(bad)
    assert "is lost in the codes" in findings(bad)[0]
    assert len(bad["subquantizers"]) == 1


# --- the gate's words ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.9", "expected a share and a k, as 0.85@10"),
        ("0.9@10/ef=3", "expected a share and a k"),
        ("1.5@10", "a recall of 1.5 is not above 0 and at most 1"),
        ("0@10", "a recall of 0 is not above 0"),
        ("0.9@7", "recall is measured at 10 and 100"),
    ],
)
def test_bad_bars(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeastRecall.parse(text)


@pytest.mark.parametrize(
    ("gate", "method", "message"),
    [
        (Gate(LeastRecall(0.9, 10, 13)), "ivf", "min_recall has nprobes 13, expected 1 to nlist, 12"),
        (Gate(LeastRecall(0.9, 10, 13)), "hnsw", "but the method is hnsw"),
        (Gate(imbalance=0.5), "ivf", "max_imbalance is 0.5, but lists of one size have 1"),
        (Gate(imbalance=2), "hnsw", "max_imbalance is about the lists of ivf"),
    ],
)
def test_bars_that_no_model_of_the_request_has(gate: Gate, method: str, message: str) -> None:
    encoder = {"name": "pq", "parameters": {"m": 4, "code_size": 8}} if method == "hnsw" else None
    with pytest.raises(ValueError, match=message):
        gate.check(request(method, None, encoder))


def test_no_bars_let_everything_pass() -> None:
    assert not Gate()
    assert Gate().failures({}) == []
    assert Gate().failures(None) == []


def test_bars_that_cannot_be_measured_are_not_reached() -> None:
    assert Gate(imbalance=2.0).failures(None) == [
        "there are too few vectors to measure what min_recall or max_imbalance is about"
    ]
