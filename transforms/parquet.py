# SPDX-License-Identifier: Apache-2.0
"""Vectors from Parquet exports, read a few row groups at a time and a block of rows at a time."""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from apache_beam.metrics import Metrics

from transforms.errors import RequestError, StorageError, TrainingError
from transforms.files import is_local, match, open_file
from transforms.reading import METRICS, ReadVectors
from transforms.sampling import priority, stream_key
from transforms.vectors import NUMPY_TYPES, RejectedVector, SourceSummary, VectorBlock, block_rows, columns

#: A slice is as many whole row groups as hold about this many bytes of vectors, and at least one.
SLICE_BYTES = 64_000_000

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_WITHOUT_VECTOR = Metrics.counter(METRICS, "documents_without_vector")


@dataclass(frozen=True)
class ParquetSlice:
    """Row groups `first` to `last` (exclusive) of one file.

    Attributes:
      row: the number of their first row.
      before: rows in the files before this one.
      total: rows in all files.
    """

    path: str
    first: int
    last: int
    row: int
    before: int
    total: int


@dataclass(frozen=True)
class ParquetVectors:
    """The vectors in one column of the Parquet files that match a pattern; see `VectorSource`.

    A row's priority depends on the seed, on its file's path below the pattern's part without wildcards, and on its
    row number: a copy of the export elsewhere gives the same sample.

    Attributes:
      pattern: a path or glob on any Beam filesystem.
      column: name of the column, with dots for the fields of structs. List, large list and fixed-size list columns of
        any float or integer type are read.
      dimension: of the vectors; binary vectors are lists of dimension / 8 bytes, as OpenSearch takes them.
      data_type: float, byte or binary.
      seed: of the sample.
    """

    pattern: str
    column: str
    dimension: int
    data_type: str = "float"
    seed: int = 0
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def summary(self) -> SourceSummary:
        footers = self._footers()
        count = read = 0
        for _, footer in footers:
            for group in range(footer.num_row_groups):
                (chunk,) = _chunks(footer, group, self.column)  # a list of numbers has one leaf
                count += self._vectors_in(chunk, footer.row_group(group).num_rows)
                read += chunk.total_compressed_size
        return SourceSummary(
            self.pattern, f"parquet, {_plural(len(footers), 'file')}", count, read / count if count else 0.0
        )

    def slices(self) -> list[ParquetSlice]:
        size = self._columns * NUMPY_TYPES[self.data_type].itemsize
        slices = []
        before, total = 0, sum(footer.num_rows for _, footer in self._footers())
        for path, footer in self._footers():
            first = row = start = 0
            for group in range(footer.num_row_groups):
                row += footer.row_group(group).num_rows
                if (row - start) * size >= SLICE_BYTES or group == footer.num_row_groups - 1:
                    slices.append(ParquetSlice(path, first, group + 1, start, before, total))
                    first, start = group + 1, row
            before += footer.num_rows
        return slices

    def read(self, part: ParquetSlice, keep: float, reject: Callable[[RejectedVector], None]) -> Iterator[VectorBlock]:
        key = stream_key(self.seed, _below(self.pattern, part.path))
        limit = None if keep >= 1 else np.uint64(min(int(keep * 2.0**64), 2**64 - 1))
        row = part.row
        batch_rows = block_rows(self._columns * NUMPY_TYPES[self.data_type].itemsize)
        with _open(part.path, self.column) as file:
            groups = list(range(part.first, part.last))
            for batch in file.iter_batches(batch_rows, row_groups=groups, columns=[self.column], use_threads=False):
                numbers = np.arange(row, row + len(batch), dtype=np.uint64)
                row += len(batch)
                priorities = priority(key, numbers)
                lists = _drill(batch, self.column)
                if lists.null_count:
                    _WITHOUT_VECTOR.inc(lists.null_count)
                chosen = None if limit is None else np.flatnonzero(priorities < limit)
                if chosen is not None and not len(chosen):
                    continue
                good, vectors = self._matrix(lists, chosen, numbers, part.path, reject)
                if len(good):
                    positions = ((part.before + numbers[good]) / part.total).astype(np.float32)
                    yield VectorBlock(
                        priorities if len(good) == len(priorities) else priorities[good], vectors, positions
                    )

    def _vectors_in(self, chunk: pq.ColumnChunkMetaData, rows: int) -> int:
        """Vectors in a row group: its rows without those that are null, if the file has statistics."""
        statistics = chunk.statistics
        if statistics is None or not statistics.has_null_count:
            return rows
        # A null stands for a list that is null or empty; one inside a vector makes a bad vector, which counts.
        return min(rows, -(-(chunk.num_values - statistics.null_count) // self._columns))

    @property
    def _columns(self) -> int:
        return columns(self.dimension, self.data_type)

    def _matrix(
        self,
        lists: pa.Array,
        chosen: np.ndarray | None,
        numbers: np.ndarray,
        path: str,
        reject: Callable[[RejectedVector], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The positions in the batch of the good vectors among `chosen` (None: all), and their matrix."""
        rows = np.arange(len(lists)) if chosen is None else chosen
        if lists.null_count:
            rows = rows[~lists.is_null().to_numpy(zero_copy_only=False)[rows]]
        starts, lengths = _extents(lists)

        def reject_where(bad: np.ndarray, reason: Callable[[int], str]) -> np.ndarray:
            for position in rows[bad]:
                reject(RejectedVector(path, f"row {numbers[position]}", reason(position)))
            return rows[~bad]

        wrong = lengths[rows] != self._columns
        if wrong.any():
            rows = reject_where(wrong, lambda r: f"length {lengths[r]}, expected {self._columns}")
        values = lists.values  # ignores the array's offset, as `starts` count from there
        if values.null_count:
            nulls = np.concatenate(([0], np.cumsum(values.is_null().to_numpy(zero_copy_only=False))))
            holes = nulls[starts[rows] + self._columns] > nulls[starts[rows]]
            rows = reject_where(holes, lambda r: "an element is null")
            values = pc.fill_null(values, 0)
        flat = values.to_numpy(zero_copy_only=False)
        if len(rows) and starts[rows[-1]] - starts[rows[0]] == (len(rows) - 1) * self._columns:
            first = starts[rows[0]]  # the rows lie side by side: a view
            matrix = flat[first : first + len(rows) * self._columns].reshape(-1, self._columns)
        else:
            matrix = flat[starts[rows][:, None] + np.arange(self._columns)]
        matrix, bad = _convert(matrix, self.data_type)
        if bad is not None:
            rows = reject_where(bad, lambda r: _value_reason(self.data_type))
            matrix = matrix[~bad]
        return rows, matrix

    def _footers(self) -> list[tuple[str, pq.FileMetaData]]:
        """Paths in order and their footers, checked against the request; read once a process."""
        if "footers" not in self._cache:
            self._cache["footers"] = [(path, self._footer(path)) for path in self._paths()]
        return self._cache["footers"]

    def _paths(self) -> list[str]:
        try:
            found = sorted(match(self.pattern))
        except StorageError as error:
            raise RequestError(str(error)) from error
        if not found:
            raise RequestError(f"no Parquet file matches {self.pattern!r}")
        return found

    def _footer(self, path: str) -> pq.FileMetaData:
        with _open(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        kind = _field_type(schema, self.column, path)
        if not any(is_list(kind) for is_list in _LISTS) or not _numeric(kind.value_type):
            raise RequestError(f"column {self.column!r} of {path} is {kind}, expected a list of floats or integers")
        if pa.types.is_fixed_size_list(kind) and kind.list_size != self._columns:
            raise RequestError(
                f"column {self.column!r} of {path} has vectors of length {kind.list_size}, "
                f"expected {self._columns} (dimension {self.dimension}, data_type {self.data_type})"
            )
        if self.data_type != "float" and not pa.types.is_integer(kind.value_type):
            raise RequestError(
                f"column {self.column!r} of {path} is {kind}, expected integers for data_type {self.data_type}"
            )
        return metadata


@dataclass(eq=False)
class ReadVectorsFromParquet(beam.PTransform):
    """`p | ReadVectorsFromParquet('exports/*.parquet', 'embedding', 768)` -> PCollection[VectorBlock].

    Args are those of `ParquetVectors`. Raises RequestError when applied if no file matches or a file's column does
    not fit; a vector of the wrong length, with a null element or with NaN or infinity ends the run.
    """

    pattern: str
    column: str
    dimension: int
    data_type: str = "float"
    seed: int = 0

    def expand(self, begin: Any) -> beam.PCollection[VectorBlock]:
        source = ParquetVectors(self.pattern, self.column, self.dimension, self.data_type, self.seed)
        return (begin | ReadVectors(source)).vectors

    def display_data(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "column": self.column,
            "dimension": self.dimension,
            "data_type": self.data_type,
        }


@contextmanager
def _open(path: str, column: str | None = None) -> Iterator[pq.ParquetFile]:
    """Opens a file, so that fixed-size lists in `column` that may be null come as plain lists."""
    raw: Any = path if is_local(path) else open_file(path, "rb")
    try:
        with pq.ParquetFile(raw, memory_map=is_local(path)) as file:
            if column is None or not _null_fixed_size_lists(file, column):
                yield file
                return
        with _WithoutArrowSchema(open(path, "rb") if raw is path else raw) as plain, pq.ParquetFile(plain) as file:
            yield file
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    finally:
        if raw is not path:
            raw.close()


def _null_fixed_size_lists(file: pq.ParquetFile, column: str) -> bool:
    if not pa.types.is_fixed_size_list(_field_type(file.schema_arrow, column, "")):
        return False
    statistics = [
        chunk.statistics for group in range(file.num_row_groups) for chunk in _chunks(file.metadata, group, column)
    ]
    return any(found is None or not found.has_null_count or found.null_count for found in statistics)


class _WithoutArrowSchema(io.RawIOBase):
    """A Parquet file whose footer says nothing of Arrow types.

    Arrow restores a fixed-size list from such a note, and then fails on the first null in it: "Expected all lists to be
    of size=8 but index 1 had size=0". Without the note it reads plain lists.
    """

    _NOTE, _HIDDEN = b"ARROW:schema", b"arrow:schema"

    def __init__(self, file: Any):
        self._file = file
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - length)
        found = file.read(length).find(self._NOTE)
        self._at = size - 8 - length + found if found >= 0 else size
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = bytearray(self._file.read() if size is None or size < 0 else self._file.read(size))
        for place, byte in enumerate(self._HIDDEN, self._at):
            if start <= place < start + len(data):
                data[place - start] = byte
        return bytes(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _below(pattern: str, path: str) -> str:
    """`path` below the folder before the pattern's first wildcard."""
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return posixpath.relpath(path.replace(os.sep, "/"), posixpath.dirname(fixed.replace(os.sep, "/")) or ".")


def _field_type(schema: pa.Schema, column: str, path: str) -> pa.DataType:
    kind: pa.DataType = pa.struct(list(schema))
    for name in column.split("."):
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise RequestError(f"no column {column!r} in {path}; its columns are {', '.join(schema.names)}")
        kind = kind.field(name).type
    return kind


def _drill(batch: pa.RecordBatch, column: str) -> pa.Array:
    first, *rest = column.split(".")
    array = batch.column(first)
    return pc.struct_field(array, rest) if rest else array


def _extents(lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Start of each list in `lists.values`, and its length."""
    if pa.types.is_fixed_size_list(lists.type):
        size = lists.type.list_size
        return (np.arange(len(lists)) + lists.offset) * size, np.full(len(lists), size)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets[:-1], np.diff(offsets)


def _convert(matrix: np.ndarray, data_type: str) -> tuple[np.ndarray, np.ndarray | None]:
    """`matrix` in the data type's numpy type and a mask of its bad rows, None if there are none."""
    wanted = NUMPY_TYPES[data_type]
    if data_type == "float":
        with np.errstate(over="ignore"):
            converted = matrix.astype(wanted, copy=False)
        # One pass that allocates nothing; only a sum that is not finite needs the closer look.
        if np.isfinite(converted.sum(dtype=np.float64)):
            return converted, None
        bad = ~np.isfinite(converted).all(axis=1)
    else:
        # OpenSearch takes binary vectors as signed bytes; files may hold either sign.
        low, high = (-128, 127) if data_type == "byte" else (-128, 255)
        bad = ((matrix < low) | (matrix > high)).any(axis=1)
        converted = matrix.astype(wanted, copy=False)
    return converted, bad if bad.any() else None


def _value_reason(data_type: str) -> str:
    return {
        "float": "an element is NaN or infinite as float32",
        "byte": "an element is outside [-128, 127]",
        "binary": "an element is outside [-128, 255]",
    }[data_type]


def _numeric(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _chunks(footer: pq.FileMetaData, group: int, column: str) -> list[pq.ColumnChunkMetaData]:
    """The leaves of `column` in one row group."""
    row_group = footer.row_group(group)
    leaves = (row_group.column(i) for i in range(row_group.num_columns))
    return [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{column}.")]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
