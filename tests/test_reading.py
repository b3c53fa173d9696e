# SPDX-License-Identifier: Apache-2.0
"""`ReadVectors` on a source made of plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to

from transforms.errors import TrainingError
from transforms.reading import ReadVectors
from transforms.sampling import priority, stream_key
from transforms.vectors import RejectedVector, SourceSummary, VectorBlock

ROWS, DIMENSION = 10, 4
closed: list[int] = []


def block(part: int) -> VectorBlock:
    rows = np.arange(ROWS)
    vectors = np.full((ROWS, DIMENSION), part, np.float32)
    return VectorBlock(priority(stream_key(7, str(part)), rows), vectors, rows / np.float32(ROWS))


@dataclass(frozen=True)
class ArraySource:
    parts: int
    bad: int = 0

    def summary(self):
        return SourceSummary("arrays", "memory", self.parts * ROWS, 4 * DIMENSION)

    def slices(self):
        return list(range(self.parts))

    def read(self, part, keep, reject):
        try:
            for row in range(self.bad):
                reject(RejectedVector(f"part {part}", f"row {row}", "length 3, expected 4"))
            whole = block(part)
            kept = whole.priorities < keep * 2.0**64
            yield VectorBlock(whole.priorities[kept], whole.vectors[kept], whole.positions[kept])
        finally:
            closed.append(part)


def run(source, check_vectors=None, check_rejected=None, **options):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    outputs = pipeline | ReadVectors(source, **options)
    if check_vectors:
        assert_that(outputs.vectors, check_vectors, label="vectors")
    if check_rejected:
        assert_that(outputs.rejected, check_rejected, label="rejected")
    result = pipeline.run()
    result.wait_until_finish()
    metrics = result.metrics().query(beam.metrics.MetricsFilter().with_namespace("knn_train"))
    return {m.key.metric.name: m.committed for m in metrics["counters"]}


def test_every_slice_is_read_once():
    def check(blocks):
        assert sorted(int(b.vectors[0, 0]) for b in blocks) == [0, 1, 2]
        for b in blocks:
            assert b == block(int(b.vectors[0, 0]))

    assert run(ArraySource(3), check) == {"vectors_read": 30, "slices_done": 3}


def test_keep_reaches_the_source():
    def check(blocks):
        found = np.concatenate([b.priorities for b in blocks])
        everything = np.concatenate([block(part).priorities for part in range(3)])
        assert sorted(found) == sorted(everything[everything < 2**62])
        assert 0 < len(found) < 30

    run(ArraySource(3), check, keep=0.25)


def test_no_slices_give_no_blocks():
    run(ArraySource(0), equal_to([]), equal_to([]))


def test_bad_vectors_are_an_output_where_some_are_allowed():
    expected = [RejectedVector(f"part {p}", f"row {r}", "length 3, expected 4") for p in range(2) for r in range(2)]
    run(ArraySource(2, bad=2), None, equal_to(expected), max_bad_vectors=2)


def test_a_slice_with_too_many_bad_vectors_ends_the_run_and_closes_the_source():
    closed.clear()
    with pytest.raises(TrainingError, match=r"2 bad vectors, 1 allowed .* part 0 row 0: length 3, expected 4"):
        run(ArraySource(1, bad=2), max_bad_vectors=1)
    assert closed == [0]


def test_labels_and_display_data():
    pipeline = beam.Pipeline(runner="FnApiRunner")
    pipeline | "Read" >> ReadVectors(ArraySource(1), keep=0.5)
    seen: list[str] = []

    class Visitor(beam.pipeline.PipelineVisitor):
        def visit_transform(self, node):
            seen.append(node.full_label)

        enter_composite_transform = visit_transform

    pipeline.visit(Visitor())
    assert {"Read/Plan slices", "Read/Spread slices", "Read/Read slices"} <= set(seen)
    assert ReadVectors(ArraySource(1), keep=0.5).display_data()["keep"] == 0.5
