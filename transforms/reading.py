# SPDX-License-Identifier: Apache-2.0
"""`ReadVectors`, the Beam side of every vector source: slices are planned on the launcher and read on the workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import DoOutputsTuple, TaggedOutput

from transforms import progress
from transforms.errors import TrainingError
from transforms.vectors import RejectedVector, VectorBlock, VectorSource

#: Tags of the outputs of `ReadVectors`.
VECTORS = "vectors"
REJECTED = "rejected"

#: Namespace of every metric of this package.
METRICS = "knn_train"


@dataclass(eq=False)
class ReadVectors(beam.PTransform):
    """Reads a source: `p | ReadVectors(source)` gives `.vectors` (VectorBlock) and `.rejected` (RejectedVector).

    Attributes:
      source: contacted once, when the transform is applied, to plan the slices.
      keep: passes on only vectors with a priority below `keep` * 2**64.
      max_bad_vectors: a slice with more bad vectors than this ends the run with TrainingError. The sum over all slices
        is the caller's to check, from the rejected output.
    """

    source: VectorSource
    keep: float = 1.0
    max_bad_vectors: int = 0

    def expand(self, begin: Any) -> DoOutputsTuple:
        return (
            begin
            | "Plan slices" >> beam.Create(list(self.source.slices()))
            # Without this, runners fuse the slices into one bundle, or read at the parallelism of Create.
            | "Spread slices" >> beam.Reshuffle()
            | "Read slices"
            >> beam.ParDo(_ReadSlice(self.source, self.keep, self.max_bad_vectors))
            .with_output_types(VectorBlock)
            .with_outputs(REJECTED, main=VECTORS)
        )

    def display_data(self) -> dict[str, Any]:
        return {"keep": self.keep, "max_bad_vectors": self.max_bad_vectors}


class _ReadSlice(beam.DoFn):
    def __init__(self, source: VectorSource, keep: float, max_bad_vectors: int):
        self._source = source
        self._keep = keep
        self._max_bad_vectors = max_bad_vectors
        self._vectors_read = Metrics.counter(METRICS, "vectors_read")
        self._slices_done = Metrics.counter(METRICS, "slices_done")
        self._block_rows = Metrics.distribution(METRICS, "block_rows")

    def process(self, part: Any) -> Iterator[Any]:
        limit = BadVectorLimit(self._max_bad_vectors)
        with closing_blocks(self._source.read(part, self._keep, limit.reject)) as blocks:
            for block in blocks:
                self._vectors_read.inc(len(block))
                progress.advance("read", len(block))
                self._block_rows.update(len(block))
                yield block
        for bad in limit.rejected:
            yield TaggedOutput(REJECTED, bad)
        self._slices_done.inc()
        progress.advance("slices", 1)


class BadVectorLimit:
    """Collects bad vectors; `reject` raises TrainingError at the first one over `allowed`."""

    def __init__(self, allowed: int):
        self._allowed = allowed
        self.rejected: list[RejectedVector] = []

    def reject(self, bad: RejectedVector) -> None:
        self.rejected.append(bad)
        if len(self.rejected) > self._allowed:
            raise TrainingError(too_many_bad_vectors(len(self.rejected), self._allowed, self.rejected[0]))


def too_many_bad_vectors(count: int, allowed: int, first: RejectedVector) -> str:
    """The line that ends a run with `count` bad vectors where `allowed` are permitted."""
    found = "1 bad vector" if count == 1 else f"{count} bad vectors"
    return f"{found}, {allowed} allowed (max_bad_vectors); the first is {first.source} {first.row}: {first.reason}"


@contextmanager
def closing_blocks(blocks: Iterator[VectorBlock]) -> Iterator[Iterator[VectorBlock]]:
    """Ends what a source holds, a search context or an open file, also where its blocks are not all taken."""
    try:
        yield blocks
    finally:
        if hasattr(blocks, "close"):  # a source may return a plain iterator
            blocks.close()
