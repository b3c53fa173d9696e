# SPDX-License-Identifier: Apache-2.0
"""How vectors are sampled: each has a pseudo-random priority, and the `size` smallest priorities are the sample.

Bottom-k by a hash priority is a reservoir whose result does not depend on the order of arrival: it is uniform without
replacement, the same for a seed over runners, slicings, bundles and retries, and it merges (Cohen and Kaplan,
"Summarizing data using bottom-k sketches", PODC 2007).
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import apache_beam as beam
import numpy as np
from apache_beam import coders
from apache_beam.metrics import Metrics
from apache_beam.pvalue import DoOutputsTuple, TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from transforms import progress, spill
from transforms.reading import METRICS, REJECTED, BadVectorLimit, closing_blocks
from transforms.spill import Spill, SpillWriter
from transforms.vectors import S, VectorBlock, VectorSource

_ALL = 2**64 - 1
_LOG = logging.getLogger("knn_train")
_SPILLED = Metrics.counter(METRICS, "vectors_spilled")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, *identity: str) -> int:
    """A 64-bit key for a stream of rows (a file, a shard) under `seed`, the same in every process."""
    digest = hashlib.blake2b("\0".join((str(seed), *identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def priority(key: int, rows: np.ndarray) -> np.ndarray:
    """Priorities of the rows of one stream.

    Args:
      key: from `stream_key`.
      rows: (n,) integers that identify rows inside the stream.

    Returns:
      (n,) uint64, uniform over the 64-bit range and distinct for distinct rows: the finalizer of SplitMix64 (Steele,
      Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) is a bijection.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (rows.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def keep_fraction(size: int, count: int, failure: float = 1e-9) -> float:
    """The fraction of `count` rows a reader must pass on so that fewer than `size` are left with probability `failure`.

    From the Chernoff bound on a binomial's lower tail, P(X <= mu - m) <= exp(-m**2 / (2 mu)), solved for mu = size + m.
    """
    log = -math.log(failure)
    expected = size + log + math.sqrt(log * log + 2 * log * size)
    return min(1.0, expected / count) if count else 1.0


@dataclass(frozen=True)
class Sample:
    """References to sampled rows: those in `spills` whose priority is not above `threshold`.

    Attributes:
      size: how many rows were asked for.
      spills: the files that hold them, in no particular order.
      threshold: uint64; rows above it are known not to be among the `size` smallest.
    """

    size: int
    spills: tuple[Spill, ...] = ()
    threshold: int = _ALL

    @property
    def rows(self) -> int:
        """Rows in the files: at least as many as `load` returns."""
        return sum(part.rows for part in self.spills)

    def first(self, size: int) -> Sample:
        """The sample of `size` rows, at most `self.size`: the smallest priorities are the same for every size."""
        return replace(self, size=size)

    def load(self) -> np.ndarray:
        """(min(size, rows seen), columns), in the order of the priorities; see `spill.load`."""
        return spill.load(self.spills, self.size, self.threshold)[0]


class SampleCoder(coders.Coder):
    """A small header and a line a file: a sample of any size is a few hundred bytes."""

    _HEAD = struct.Struct("<BQQ")

    def encode(self, sample: Sample) -> bytes:
        rows = "\n".join(f"{s.rows}\t{s.columns}\t{s.dtype}\t{s.path}" for s in sample.spills)
        return self._HEAD.pack(1, sample.size, sample.threshold) + rows.encode()

    def decode(self, encoded: bytes) -> Sample:
        version, size, threshold = self._HEAD.unpack_from(encoded)
        if version != 1:
            raise ValueError(f"Sample version {version}, expected 1")
        spills = []
        for line in encoded[self._HEAD.size :].decode().splitlines():
            rows, cols, dtype, path = line.split("\t", 3)
            spills.append(Spill(path, int(rows), int(cols), dtype))
        return Sample(size, tuple(spills), threshold)

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> Any:
        return Sample


coders.registry.register_coder(Sample, SampleCoder)


class ReservoirFn(beam.CombineFn):
    """Keeps references to the `size` smallest priorities.

    The accumulator is a `Sample`: files and a threshold. Priorities stay in the files beside their rows and are read
    only when more than twice `size` rows have gathered, so an accumulator has the same few hundred bytes for any
    `size`.
    """

    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def get_accumulator_coder(self) -> coders.Coder:
        return SampleCoder()

    def create_accumulator(self) -> Sample:
        return Sample(self._size)

    def add_input(self, accumulator: Sample, part: Spill) -> Sample:
        return self._merge((accumulator, Sample(self._size, (part,))))

    def merge_accumulators(self, accumulators: Iterable[Sample]) -> Sample:
        return self._merge(tuple(accumulators))

    def compact(self, accumulator: Sample) -> Sample:
        if accumulator.rows <= 2 * self._size:
            return accumulator
        priorities = [part.order()[0] for part in accumulator.spills]
        threshold = spill.smallest(priorities, self._size, accumulator.threshold)
        kept = (part for part, own in zip(accumulator.spills, priorities, strict=True) if own.min() <= threshold)
        return Sample(self._size, tuple(kept), threshold)

    def extract_output(self, accumulator: Sample) -> Sample:
        return self.compact(accumulator)

    def _merge(self, samples: Sequence[Sample]) -> Sample:
        spills = tuple(part for sample in samples for part in sample.spills)
        return Sample(self._size, spills, min((sample.threshold for sample in samples), default=_ALL))


class _Spiller:
    """Writes what can still be among the `size` smallest of what it was given to one pair of files."""

    def __init__(self, folder: str, size: int):
        self._writer = SpillWriter(folder)
        self._cut = _Cut(size)

    def add(self, block: VectorBlock) -> None:
        keep = self._cut.keep(block.priorities)
        self._writer.append(block.priorities[keep], block.vectors[keep], block.positions[keep])

    def close(self) -> tuple[Spill, ...]:
        written = self._writer.close()
        return (written,) if written else ()


class _SpillFn(beam.DoFn):
    """Spills a bundle's blocks and emits the reference."""

    def __init__(self, folder: str, size: int):
        self._folder = folder
        self._size = size

    def start_bundle(self) -> None:
        self._spiller = _Spiller(self._folder, self._size)

    def process(self, block: VectorBlock) -> None:
        self._spiller.add(block)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        window = GlobalWindow()
        for written in self._spiller.close():
            _SPILLED.inc(written.rows)
            yield WindowedValue(written, window.max_timestamp(), (window,))


class _Cut:
    """The priority above which a row cannot be among the `size` smallest seen so far."""

    def __init__(self, size: int):
        self._size = size
        self._pending: list[np.ndarray] = []
        self._rows = 0
        self._threshold = np.uint64(_ALL)

    def keep(self, priorities: np.ndarray) -> np.ndarray | slice:
        """An index of the rows to keep."""
        index: np.ndarray | slice = slice(None)
        if self._threshold != _ALL:
            index = priorities <= self._threshold
            priorities = priorities[index]
        self._pending.append(priorities)
        self._rows += len(priorities)
        if self._rows > 2 * self._size:
            smallest = np.partition(np.concatenate(self._pending), self._size - 1)[: self._size]
            self._threshold = smallest.max()
            self._pending, self._rows = [smallest], self._size
        return index


@dataclass
class SampleVectors(beam.PTransform):
    """PCollection[VectorBlock] -> PCollection[Sample] of exactly one element.

    The sample is uniform without replacement and has exactly min(size, number of vectors) rows.

    Attributes:
      size: rows to keep.
      folder: where spill files go; workers and the training step must share it. The caller removes it after the run.
    """

    size: int
    folder: str

    def __post_init__(self) -> None:
        super().__init__()
        if self.size < 1:
            raise ValueError(f"sample size {self.size}, expected at least 1")

    def expand(self, blocks: beam.PCollection[VectorBlock]) -> beam.PCollection[Sample]:
        spills = blocks | "Write spill files" >> beam.ParDo(_SpillFn(self.folder, self.size)).with_output_types(Spill)
        # With defaults: no vectors at all must reach the trainer as an empty sample, not as silence. The side input
        # that this costs carries a few hundred bytes.
        return spills | "Keep smallest priorities" >> beam.CombineGlobally(ReservoirFn(self.size)).with_output_types(
            Sample
        )

    def display_data(self) -> dict[str, Any]:
        return {"size": self.size, "folder": self.folder}


@dataclass(eq=False)
class FillSample(beam.PTransform, Generic[S]):
    """PCollection[Sample] -> `.sample`, with all its rows, and `.rejected` (RejectedVector).

    Where readers have passed on a share of the vectors that turns out to be too small, all of the source is read again,
    in one worker. `keep_fraction` makes that rarer than 1e-9, unless the source has fewer vectors than it said: many of
    them bad, or null in Parquet files that have no statistics.

    Attributes:
      source: what was read.
      folder: as that of `SampleVectors`.
      max_bad_vectors: more of them than this, in all slices together, end the run with TrainingError.
    """

    source: VectorSource[S]
    folder: str
    max_bad_vectors: int = 0

    def expand(self, samples: beam.PCollection[Sample]) -> DoOutputsTuple:
        fill = beam.ParDo(_FillFn(self.source, self.folder, self.max_bad_vectors))
        return samples | "Read on if short" >> fill.with_output_types(Sample).with_outputs(REJECTED, main="sample")


class _FillFn(beam.DoFn, Generic[S]):
    def __init__(self, source: VectorSource[S], folder: str, max_bad_vectors: int):
        self._source, self._folder, self._max_bad_vectors = source, folder, max_bad_vectors

    def process(self, sample: Sample) -> Iterator[Any]:
        if sample.rows >= sample.size:
            yield sample
            return
        _LOG.info("The sample has %d of %d vectors: all are read again", sample.rows, sample.size)
        spiller = _Spiller(self._folder, sample.size)
        limit = BadVectorLimit(self._max_bad_vectors)
        slices = self._source.slices()
        for number, part in enumerate(slices, 1):
            with closing_blocks(self._source.read(part, 1.0, limit.reject)) as blocks:
                for block in blocks:
                    progress.advance("vectors read again", len(block))
                    spiller.add(block)
            progress.report("read again", number, len(slices))
        yield Sample(sample.size, spiller.close())
        for bad in limit.rejected:
            yield TaggedOutput(REJECTED, bad)
