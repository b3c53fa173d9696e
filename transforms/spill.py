# SPDX-License-Identifier: Apache-2.0
"""Spill files: where sampled vectors wait for the training step, so that only references to them travel through Beam.

Any element of 2 GiB ends a portable runner, and a combine that carries vectors costs ten times the sample in memory.
Rows are therefore written under the run's temporary folder as they are read; what travels is a `Spill` of a few dozen
bytes.

Nothing here imports Beam unless a path is remote: the training process starts in half a second because of it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from transforms.errors import TrainingError
from transforms.files import explained, is_local, open_file, read_whole

_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Spill:
    """A pair of files: `path`.vectors holds `rows` x `columns` values of `dtype`; `path`.order as many uint64
    priorities, and after them as many float32 positions.
    """

    path: str
    rows: int
    columns: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        return self.columns * np.dtype(self.dtype).itemsize

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) uint64 priorities and (rows,) float32 positions; see `VectorBlock`."""
        data = read_whole(self.path + ".order")
        return np.frombuffer(data, "<u8", self.rows), np.frombuffer(data, "<f4", self.rows, 8 * self.rows)

    def blocks(self) -> Iterator[np.ndarray]:
        """The vectors in order, as (n, columns) matrices of about 4 MB."""
        step = max(1, _READ_BYTES // self.row_bytes)
        with open_file(self.path + ".vectors", "rb") as file:
            for start in range(0, self.rows, step):
                count = min(step, self.rows - start)
                data = file.read(count * self.row_bytes)
                yield np.frombuffer(data, self.dtype, count * self.columns).reshape(count, self.columns)


class SpillWriter:
    """Appends rows to a new spill under `folder`. Each writer has a new name: a retried bundle writes over no other."""

    def __init__(self, folder: str):
        self._path = f"{folder.rstrip('/')}/{uuid.uuid4().hex}"
        self._file: BinaryIO | None = None
        self._priorities: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._rows = 0
        self._columns = 0
        self._dtype = ""

    def append(self, priorities: np.ndarray, vectors: np.ndarray, positions: np.ndarray) -> None:
        """Adds (n,) uint64 priorities, their (n, columns) vectors and their (n,) positions.

        Raises:
          TrainingError: the folder has been removed.
        """
        if not len(priorities):
            return
        if self._file is None:
            self._columns, self._dtype = vectors.shape[1], vectors.dtype.str
            self._file = open_file(self._path + ".vectors", "wb")
        elif is_local(self._path) and not os.path.exists(self._path + ".vectors"):
            # Not every runner stops the steps of a cancelled job, and these would read on.
            raise TrainingError(f"the run was given up: {self._path} is gone")
        elif (vectors.shape[1], vectors.dtype.str) != (self._columns, self._dtype):
            raise ValueError(
                f"vectors with {vectors.shape[1]} columns of {vectors.dtype.str} "
                f"among vectors with {self._columns} columns of {self._dtype}"
            )
        with explained("write", self._path):
            self._file.write(np.ascontiguousarray(vectors).data)
        self._priorities.append(np.array(priorities, "<u8"))
        self._positions.append(np.array(positions, "<f4"))
        self._rows += len(priorities)

    def close(self) -> Spill | None:
        """Finishes both files; None if no row was written."""
        if self._file is None:
            return None
        with explained("write", self._path):
            self._file.close()
        with explained("write", self._path), open_file(self._path + ".order", "wb") as file:
            file.write(np.concatenate(self._priorities).data)
            file.write(np.concatenate(self._positions).data)
        return Spill(self._path, self._rows, self._columns, self._dtype)


def smallest(priorities: Sequence[np.ndarray], size: int, below: int = 2**64 - 1) -> int:
    """The `size`-th smallest of the priorities not above `below`; `below` if there are no more than `size`."""
    if sum(map(len, priorities)) <= size:
        return below
    together = np.concatenate([each[each <= np.uint64(below)] for each in priorities])
    if len(together) <= size:
        return below
    return int(np.partition(together, size - 1)[size - 1])


def load(spills: Sequence[Spill], size: int, below: int = 2**64 - 1) -> tuple[np.ndarray, np.ndarray]:
    """The sample itself: the vectors with the `size` smallest priorities, in the order of their priorities.

    One array is allocated and filled in place. Rows of equal priority are ordered by their bytes, so the result does
    not depend on which file holds a row: rows that are equal in both are interchangeable.

    Returns:
      (min(size, rows), columns) array of the spills' dtype, and the (min(size, rows),) float32 positions of its rows.
    """
    if not spills:
        raise ValueError("no spill files")
    everything = [spill.order() for spill in spills]
    below = smallest([priorities for priorities, _ in everything], size, below)
    chosen = [np.flatnonzero(each <= np.uint64(below)) for each, _ in everything]
    priorities, positions = (
        np.concatenate([each[at][rows] for each, rows in zip(everything, chosen, strict=True)]) for at in (0, 1)
    )
    del everything
    order = np.argsort(priorities, kind="stable")
    positions = positions[order]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    vectors = np.empty((len(order), spills[0].columns), spills[0].dtype)
    offset = 0
    for spill, rows in zip(spills, chosen, strict=True):
        targets = rank[offset : offset + len(rows)]
        offset += len(rows)
        start = 0
        for block in spill.blocks():
            first, last = np.searchsorted(rows, (start, start + len(block)))
            vectors[targets[first:last]] = block[rows[first:last] - start]
            start += len(block)
    _order_ties(priorities[order], vectors, positions)
    return vectors[:size], positions[:size]


def _order_ties(priorities: np.ndarray, vectors: np.ndarray, positions: np.ndarray) -> None:
    same = np.flatnonzero(priorities[1:] == priorities[:-1])
    for first in same:
        if first and priorities[first - 1] == priorities[first]:
            continue  # inside a group that was ordered from its first row
        last = int(np.searchsorted(priorities, priorities[first], "right"))
        group, places = vectors[first:last], positions[first:last]
        ranks = sorted(range(len(group)), key=lambda row: (group[row].tobytes(), places[row]))
        group[:], places[:] = group[ranks], places[ranks]
