# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam import coders
from apache_beam.pvalue import DoOutputsTuple
from apache_beam.testing.util import assert_that, equal_to

from transforms import progress
from transforms.errors import TrainingError
from transforms.reading import ReadVectors
from transforms.sampling import (
    FillSample,
    ReservoirFn,
    Sample,
    SampleCoder,
    SampleVectors,
    keep_fraction,
    priority,
    stream_key,
)
from transforms.spill import Spill, SpillWriter, load
from transforms.vectors import RejectedVector, SourceSummary, VectorBlock


def spill(folder: Path, priorities: Sequence[int], vectors: np.ndarray | None = None) -> Spill:
    writer = SpillWriter(str(folder))
    own = np.array(priorities, np.uint64)
    rows = own[:, None].astype(np.float32) if vectors is None else vectors
    writer.append(own, rows, rows[:, 0] / 10)
    written = writer.close()
    assert written is not None
    return written


# --- priorities ---


def test_priorities_do_not_change() -> None:
    # A change of these numbers changes every sample that a seed stands for. The priorities are the published first two
    # outputs of SplitMix64 seeded with 1.
    assert stream_key(42, "part-0.parquet") == 2198800562002532005
    assert priority(1, np.arange(2)).tolist() == [10451216379200822465, 13757245211066428519]


def test_priorities_are_distinct_and_differ_by_seed_and_stream() -> None:
    rows = np.arange(200_000)
    one = priority(stream_key(1, "a"), rows)
    assert len(np.unique(one)) == len(rows)
    for other in (stream_key(2, "a"), stream_key(1, "b")):
        assert np.abs(np.corrcoef(one, priority(other, rows))[0, 1]) < 0.01


def test_stream_key_separates_its_parts() -> None:
    assert stream_key(1, "ab", "c") != stream_key(1, "a", "bc")


def chi_square(observed: np.ndarray, expected: float) -> float:
    """Standard score of the chi-square statistic (Wilson and Hilferty's normal approximation)."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(observed) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sample_is_uniform_over_position_and_file(seed: int) -> None:
    files, rows, size = 20, 50_000, 100_000
    priorities = np.stack([priority(stream_key(seed, f"part-{f}"), np.arange(rows)) for f in range(files)])
    chosen = priorities <= np.partition(priorities.ravel(), size - 1)[size - 1]
    assert chosen.sum() == size
    by_file = chosen.sum(axis=1)
    by_position = chosen.reshape(files, 50, -1).sum(axis=(0, 2))
    # Four standard deviations: a uniform sample fails once in 30 000 seeds.
    assert abs(chi_square(by_file, size / files)) < 4
    assert abs(chi_square(by_position, size / 50)) < 4


@pytest.mark.parametrize("size", [1, 10, 1_000, 100_000])
def test_keep_fraction_leaves_enough(size: int) -> None:
    count = 50 * size
    keep = keep_fraction(size, count)
    assert size / count < keep <= 1
    if keep < 1:
        # With the margin for one in a billion, none of 2000 trials may fall short; without a margin half would.
        assert np.random.default_rng(0).binomial(count, keep, 2000).min() >= size


def test_keep_fraction_of_nothing_and_of_all() -> None:
    assert keep_fraction(10, 0) == 1
    assert keep_fraction(10, 10) == 1


# --- the reservoir ---


@pytest.mark.parametrize("seed", range(20))
def test_reservoir_is_right_under_any_bracketing(tmp_path: Path, seed: int) -> None:
    rng, order = np.random.default_rng(seed), random.Random(seed)
    size = int(rng.integers(1, 40))
    parts = [rng.integers(0, 1000, rng.integers(1, 30)) for _ in range(rng.integers(1, 12))]
    fn = ReservoirFn(size)
    accumulators = []
    for part in parts:
        accumulators.append(fn.add_input(fn.create_accumulator(), spill(tmp_path, part)))
    while len(accumulators) > 1:
        chosen = [accumulators.pop(order.randrange(len(accumulators))) for _ in range(min(2, len(accumulators)))]
        if order.random() < 0.3:
            chosen.append(fn.create_accumulator())
        merged = fn.merge_accumulators(iter(chosen))
        if order.random() < 0.5:
            merged = SampleCoder().decode(SampleCoder().encode(fn.compact(merged)))
        accumulators.append(merged)
    sample = fn.extract_output(accumulators[0])
    expected = np.sort(np.concatenate(parts))[:size]
    assert sample.load().ravel().tolist() == expected.tolist()


def test_compact_drops_files_with_nothing_in_the_sample(tmp_path: Path) -> None:
    fn = ReservoirFn(3)
    low, high = spill(tmp_path, [1, 2, 3, 4]), spill(tmp_path, [10, 11, 12, 13])
    sample = fn.compact(fn.merge_accumulators([Sample(3, (low,)), Sample(3, (high,))]))
    assert sample.spills == (low,)
    assert sample.threshold == 3


def test_accumulator_does_not_grow_with_the_sample(tmp_path: Path) -> None:
    rows = 200_000
    sample = Sample(rows, (spill(tmp_path, range(rows)),))
    assert len(SampleCoder().encode(sample)) < 1000
    assert isinstance(coders.registry.get_coder(Sample), SampleCoder)
    assert isinstance(ReservoirFn(1).get_accumulator_coder(), SampleCoder)


def test_rows_of_equal_priority_are_ordered_by_their_bytes(tmp_path: Path) -> None:
    a, b, c = np.float32([[1, 9], [2, 9], [3, 9]])
    one = spill(tmp_path, [5, 5, 5], np.stack([b, c, a]))
    first, second, third = (spill(tmp_path, [5], row[None]) for row in (c, a, b))
    expected = sorted([a.tobytes(), b.tobytes(), c.tobytes()])
    for spills in ((one,), (first, second, third), (third, first, second)):
        assert [row.tobytes() for row in Sample(3, spills).load()] == expected
        assert [row.tobytes() for row in Sample(2, spills).load()] == expected[:2]


def test_positions_stay_with_their_rows(tmp_path: Path) -> None:
    """Also where priorities are equal, and where rows are equal too."""
    rows = np.float32([[2, 9], [1, 9], [1, 9], [7, 0], [6, 0]])
    places = np.float32([0.5, 0.4, 0.3, 0.9, 0.8])

    def spilled(*at: int) -> Spill:
        writer = SpillWriter(str(tmp_path))
        writer.append(np.uint64([5, 5, 5, 9, 2])[list(at)], rows[list(at)], places[list(at)])
        written = writer.close()
        assert written is not None
        return written

    for spills in ((spilled(0, 1, 2, 3, 4),), (spilled(4), spilled(2, 0), spilled(3, 1))):
        vectors, positions = load(spills, 5)
        assert vectors.tolist() == [[6, 0], [2, 9], [1, 9], [1, 9], [7, 0]]  # the bytes of 2 are the smaller
        assert positions.tolist() == np.float32([0.8, 0.5, 0.3, 0.4, 0.9]).tolist()


def test_spills_of_another_width_are_refused(tmp_path: Path) -> None:
    writer = SpillWriter(str(tmp_path))
    writer.append(np.zeros(1, np.uint64), np.zeros((1, 4), np.float32), np.zeros(1))
    with pytest.raises(ValueError, match="5 columns of <f4 among vectors with 4 columns of <f4"):
        writer.append(np.zeros(1, np.uint64), np.zeros((1, 5), np.float32), np.zeros(1))


def test_a_run_that_was_given_up_spills_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    writer = SpillWriter(str(folder))
    writer.append(np.zeros(1, np.uint64), np.zeros((1, 4), np.float32), np.zeros(1))
    shutil.rmtree(folder)
    with pytest.raises(TrainingError, match=r"the run was given up: .* is gone"):
        writer.append(np.zeros(1, np.uint64), np.zeros((1, 4), np.float32), np.zeros(1))


# --- the transform ---


@dataclass(frozen=True)
class Numbers:
    """A source of `count` vectors: row i is (i, i / count); `null` of every ten rows turn out to have none."""

    count: int
    parts: int = 3
    null: int = 0
    bad: int = 0

    def summary(self) -> SourceSummary:
        return SourceSummary("numbers", "test", self.count, 8)

    def slices(self) -> list[tuple[int, int]]:
        edges = np.linspace(0, self.count, self.parts + 1).astype(int)
        return list(itertools.pairwise(edges.tolist()))

    def read(
        self, part: tuple[int, int], keep: float, reject: Callable[[RejectedVector], None]
    ) -> Iterator[VectorBlock]:
        for start in range(part[0], part[1], 700):
            rows = np.arange(start, min(start + 700, part[1]))
            rows = rows[rows % 10 >= self.null]
            priorities = priority(stream_key(3, "numbers"), rows)
            if keep < 1:
                rows, priorities = rows[priorities < keep * 2.0**64], priorities[priorities < keep * 2.0**64]
            for row in rows[rows < self.bad]:
                reject(RejectedVector("numbers", f"row {row}", "bad"))
            good = rows >= self.bad
            vectors = np.stack([rows, rows / self.count], 1).astype(np.float32)[good]
            yield VectorBlock(priorities[good], vectors, vectors[:, 1])


def sampled(source: Numbers, size: int, folder: Path, keep: float = 1.0, **options: object) -> np.ndarray:
    """The sample that a pipeline draws, loaded inside it."""
    found: list[np.ndarray] = []
    out = str(folder / f"sample-{random.random()}.npy")
    with beam.Pipeline("FnApiRunner", options=beam.options.pipeline_options.PipelineOptions(**options)) as p:
        sample = (p | ReadVectors(source, keep)).vectors | SampleVectors(size, str(folder))
        if keep < 1:
            sample = (sample | FillSample(source, str(folder))).sample
        sample | beam.Map(lambda s: np.save(out, s.load() if s.spills else np.empty((0, 2))))
    found.append(np.load(out))
    return found[0]


def expected_sample(source: Numbers, size: int) -> np.ndarray:
    blocks = list(source.read((0, source.count), 1.0, lambda _: None))
    priorities = np.concatenate([block.priorities for block in blocks])
    vectors = np.concatenate([block.vectors for block in blocks])
    return vectors[np.argsort(priorities)[:size]]


@pytest.mark.parametrize("parts", [1, 4, 13])
@pytest.mark.parametrize("thinned", [False, True])
def test_sample_is_the_same_however_it_is_read(tmp_path: Path, parts: int, thinned: bool) -> None:
    source = Numbers(20_000, parts)
    keep = keep_fraction(500, 20_000) if thinned else 1.0
    assert np.array_equal(sampled(source, 500, tmp_path, keep), expected_sample(source, 500))


def test_sample_of_a_source_smaller_than_it(tmp_path: Path) -> None:
    assert len(sampled(Numbers(300), 500, tmp_path)) == 300


def test_no_vectors_give_an_empty_sample_not_silence(tmp_path: Path) -> None:
    assert sampled(Numbers(1), 5, tmp_path).shape == (1, 2)
    assert sampled(Numbers(1, null=10), 5, tmp_path).shape == (0, 2)


def test_a_short_sample_is_filled_by_reading_all(tmp_path: Path) -> None:
    # Nine of ten rows that the source counted have no vector, so what the margin passes on is far too little.
    source = Numbers(20_000, null=9)
    keep = keep_fraction(500, 20_000)
    assert keep * 2_000 < 250
    assert np.array_equal(sampled(source, 500, tmp_path, keep), expected_sample(source, 500))


def test_a_sample_of_all_there_is_may_stay_short(tmp_path: Path) -> None:
    source = Numbers(1_000)
    assert np.array_equal(sampled(source, 5_000, tmp_path, 0.5), expected_sample(source, 5_000))


def test_bad_vectors_that_are_met_on_filling_are_told(tmp_path: Path) -> None:
    source, out = Numbers(1_000, bad=5), str(tmp_path)

    def check(rejected: list[RejectedVector]) -> None:
        assert sorted(bad.row for bad in rejected) == [f"row {number}" for number in range(5)]

    def fill(p: beam.Pipeline, allowed: int) -> DoOutputsTuple:
        return p | beam.Create([Sample(5_000)]) | FillSample(source, out, allowed)

    with beam.Pipeline("FnApiRunner") as p:
        filled = fill(p, 5)
        assert_that(filled.rejected, check)
        assert_that(filled.sample | beam.Map(lambda sample: sample.rows), equal_to([995]), "rows")
    with pytest.raises(RuntimeError, match="3 bad vectors, 2 allowed"), beam.Pipeline("FnApiRunner") as p:
        fill(p, 2)


def test_filling_can_be_cancelled(tmp_path: Path) -> None:
    progress.listen(None)
    progress.cancel()
    try:
        with pytest.raises(RuntimeError, match="interrupted"), beam.Pipeline("FnApiRunner") as p:
            p | beam.Create([Sample(5_000)]) | FillSample(Numbers(1_000), str(tmp_path))
    finally:
        progress.listen(None)


def test_sample_of_drifting_data_is_centred_where_the_first_rows_are_not(tmp_path: Path) -> None:
    source = Numbers(50_000)  # the second column drifts from 0 to 1
    size = 2_000
    ours = sampled(source, size, tmp_path)[:, 1].mean()
    first = np.arange(size).mean() / source.count
    assert abs(ours - 0.5) < 4 / math.sqrt(12 * size)
    assert first < 0.03


def test_a_sample_has_a_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample size 0, expected at least 1"):
        SampleVectors(0, str(tmp_path))
