# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from transforms import faiss_training, report
from transforms.model import CREATED, FAILED, TrainedModel, metadata
from transforms.quality import evaluate
from transforms.request import TrainingRequest
from transforms.svg import Chart, number

D = 8
VECTORS = np.random.default_rng(2).standard_normal((6_000, D)).astype(np.float32)
ERRORS = ["Quantisation error", "Error by sub-quantizer"]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def model(method: str = "ivf", encoder: bool = True, **fields: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = {"nlist": 16, "nprobes": 2} if method == "ivf" else {}
    if encoder:
        parameters["encoder"] = {"name": "pq", "parameters": {"m": 4, "code_size": 8}}
    body = {"training_index": "i", "training_field": "f", "dimension": D, **fields}
    method_ = {"name": method, "engine": "faiss", "parameters": parameters}
    request = TrainingRequest.from_fields({**body, "method": method_})
    vectors = VECTORS.copy()
    history: list[dict[str, float]] = []
    blob = faiss_training.train(vectors[:4_000], request, 2, history=history)
    positions = np.random.default_rng(3).random(len(vectors), np.float32)
    quality = evaluate(blob, request, vectors, 4_000, 50_000, history=history, positions=positions)
    provenance = {"source": "products", "index_description": request.index_description, "query": {"match_all": {}}}
    return TrainedModel("m1", metadata(request, CREATED), blob, provenance, quality).json()


class Page(HTMLParser):
    """Everything on a page that could run or load something, its tags, and whether they close."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize(
    ("method", "encoder", "charts"),
    [
        ("ivf", True, ["Recall", *ERRORS, "List sizes", "k-means", "Lengths", "Drift along the source"]),
        ("ivf", False, ["Recall", ERRORS[0], "List sizes", "k-means", "Lengths", "Drift along the source"]),
        ("hnsw", True, [*ERRORS, "Lengths", "Drift along the source"]),
    ],
)
def test_page_has_the_charts_of_its_kind_of_model(method: str, encoder: bool, charts: list[str]) -> None:
    text = report.html(model(method, encoder))
    assert re.findall(r"<figure><h2>(.*?)</h2>", text) == charts
    Page(text)


def test_page_needs_nothing_from_elsewhere() -> None:
    text = report.html(model())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", text)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower())


def names_in(value: Any, path: tuple = ()) -> list[tuple]:
    """Where there are texts in a JSON value."""
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in names_in(item, (*path, name))]
    return [path] if isinstance(value, str) else []


def test_no_name_can_put_markup_into_the_page() -> None:
    description = model()
    description["description"] = description["error"] = "x"
    before = sorted(Page(report.html(description)).tags)
    for path in names_in(description):
        if path in (("quality", "error", "compared_by"), ("state",)):
            continue
        evil = copy.deepcopy(description)
        place = evil
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = EVIL
        text = report.html(evil)
        assert "<script" not in text, path
        assert "<img" not in text, path
        assert sorted(Page(text).tags) == before, path
    evil = copy.deepcopy(description)
    evil["provenance"][EVIL] = {EVIL: [EVIL]}
    assert "<script" not in report.html(evil)
    evil["state"] = EVIL
    assert "<script" not in report.html(evil)


def test_page_of_a_failed_model_says_why() -> None:
    description = {**model(), "state": FAILED, "error": "min_recall is 0.9@10 but recall@10 is 0.2 with nprobes 2"}
    description["quality"]["gate"] = {"recall": {"share": 0.9, "k": 10, "nprobes": None}, "imbalance": None}
    text = "".join(Page(report.html(description)).text)
    assert "min_recall is 0.9@10 but recall@10 is 0.2 with nprobes 2" in text
    assert "at least 0.9 @10" in text
    assert "is lost in the codes" in text


def test_page_compares_with_the_model_before() -> None:
    description = model()
    old = {"model_id": "old", "error": 2.0, "error_then": None, "error_of_new": 1.5, "nprobes": 4}
    description["quality"]["previous"] = {**old, "expected": {"10": 0.345, "100": 0.4}}
    recall = description["quality"]["at"]["expected"]["10"]
    said = f"Error 1.5, recall@10 to expect {recall:.2f}; on the same vectors old has 2 and 0.34 (nprobes 4)."
    assert said in "".join(Page(report.html(description)).text)


@pytest.mark.parametrize(
    ("value", "shown"), [(1_024, "1,024"), (0.85, "0.85"), (3_200_000, "3.2 M"), (65_536, "65.5 k"), (0, "0")]
)
def test_numbers_for_people(value: float, shown: str) -> None:
    assert number(value) == shown


def test_marks_stay_inside_the_chart() -> None:
    svg = Chart("c", (1, 8), (0, 1), log_x=True).line([(1, -5), (8, 9)], "line").dots([(2, 0.5, "<x>")], "dot").svg()
    points = [float(each) for pair in re.findall(r'points="(.*?)"', svg)[0].split() for each in pair.split(",")]
    assert min(points) >= 0
    assert max(points) <= 360
    assert "&lt;x&gt;" in svg
