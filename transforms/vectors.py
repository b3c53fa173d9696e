# SPDX-License-Identifier: Apache-2.0
"""`VectorBlock`, the one element type that carries vectors, its coder, and what a source of vectors must offer.

A block is a matrix, never a list of rows: 10 000 x 128 floats cost 2 ms to encode and decode as one matrix and 118 ms
as Python lists.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from apache_beam import coders

#: Largest number of bytes in one block, priorities and positions included.
MAX_BLOCK_BYTES = 4_000_000

#: Bytes of a row beside its vector: the priority and the position.
ROW_BYTES = 12

#: What the plugin's `data_type` is in numpy: binary vectors travel packed, 8 dimensions a byte.
NUMPY_TYPES: dict[str, np.dtype] = {"float": np.dtype("<f4"), "byte": np.dtype("i1"), "binary": np.dtype("u1")}

_WIRE_TYPES = tuple(NUMPY_TYPES.values())
_HEADER = struct.Struct("<BBIQ")  # version, index into _WIRE_TYPES, columns, rows
_VERSION = 2


def columns(dimension: int, data_type: str) -> int:
    """Matrix columns of a vector: `dimension`, or `dimension / 8` bytes for binary vectors."""
    return dimension // 8 if data_type == "binary" else dimension


def block_rows(row_bytes: int) -> int:
    """Rows of `row_bytes` bytes that fit a block beside their priorities and positions; at least one."""
    return max(1, MAX_BLOCK_BYTES // (row_bytes + ROW_BYTES))


@dataclass(frozen=True, eq=False)
class VectorBlock:
    """Vectors with the priorities that decide whether they are sampled, and where they are in their source.

    Attributes:
      priorities: (n,) uint64. The sample is made of the smallest priorities.
      vectors: (n, columns) float32, int8 or (binary vectors, packed) uint8.
      positions: (n,) float32 from 0 to 1, the share of the source that comes before each vector in the source's own
        order: rows of files, or the order in which an index was written.
    """

    priorities: np.ndarray
    vectors: np.ndarray
    positions: np.ndarray

    def __post_init__(self) -> None:
        rows = self.vectors.shape[:1]
        if self.priorities.shape != rows or self.positions.shape != rows or self.vectors.ndim != 2:
            raise ValueError(
                f"block of {self.priorities.shape} priorities, {self.vectors.shape} vectors and "
                f"{self.positions.shape} positions"
            )

    def __len__(self) -> int:
        return len(self.priorities)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, VectorBlock)
            and self.vectors.dtype == other.vectors.dtype
            and np.array_equal(self.priorities, other.priorities)
            and np.array_equal(self.vectors, other.vectors)
            and np.array_equal(self.positions, other.positions)
        )

    __hash__ = None  # type: ignore[assignment]


class VectorBlockCoder(coders.Coder):
    """Raw little-endian buffers behind a small header; decoding copies nothing."""

    def encode(self, block: VectorBlock) -> bytes:
        vectors = np.ascontiguousarray(block.vectors)
        rows, cols = vectors.shape
        header = _HEADER.pack(_VERSION, _WIRE_TYPES.index(vectors.dtype), cols, rows)
        priorities = np.ascontiguousarray(block.priorities, "<u8")
        positions = np.ascontiguousarray(block.positions, "<f4")
        return b"".join((header, priorities.data, positions.data, vectors.data))

    def decode(self, encoded: bytes) -> VectorBlock:
        version, kind, cols, rows = _HEADER.unpack_from(encoded)
        if version != _VERSION:
            raise ValueError(f"VectorBlock version {version}, expected {_VERSION}")
        priorities = np.frombuffer(encoded, "<u8", rows, _HEADER.size)
        positions = np.frombuffer(encoded, "<f4", rows, _HEADER.size + 8 * rows)
        vectors = np.frombuffer(encoded, _WIRE_TYPES[kind], rows * cols, _HEADER.size + ROW_BYTES * rows)
        return VectorBlock(priorities, vectors.reshape(rows, cols), positions)

    def estimate_size(self, block: VectorBlock) -> int:
        # Without this Beam encodes every block again only to learn its size.
        return _HEADER.size + ROW_BYTES * len(block) + block.vectors.nbytes

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> Any:
        return VectorBlock


coders.registry.register_coder(VectorBlock, VectorBlockCoder)


@dataclass(frozen=True)
class RejectedVector:
    """A vector that cannot be used: where and why, e.g. ('part-3.parquet', 'row 17', 'length 96, expected 128')."""

    source: str
    row: str
    reason: str


@dataclass(frozen=True)
class SourceSummary:
    """What a source says of itself before it is read; the plan and the model's provenance show it.

    Attributes:
      name: the index expression or the file pattern.
      reader: how it is read, e.g. 'parquet' or 'script+cbor, point in time'.
      count: vectors (an upper bound for Parquet files without statistics, whose nulls are only seen on reading).
      row_bytes: bytes read from the source per vector, estimated.
      documents: documents in the index, with or without a vector; None for sources that have no such thing.
    """

    name: str
    reader: str
    count: int
    row_bytes: float
    documents: int | None = None


S = TypeVar("S")


class VectorSource(Protocol[S]):
    """What `ReadFromOpenSearch` and `ReadVectorsFromParquet` are made of; picklable, opens nothing until asked."""

    def summary(self) -> SourceSummary:
        """Contacts the source. Raises RequestError if it does not fit the request."""

    def slices(self) -> Sequence[S]:
        """Independent, picklable parts that together hold each vector once. Contacts the source."""

    def read(self, part: S, keep: float, reject: Callable[[RejectedVector], None]) -> Iterator[VectorBlock]:
        """Blocks of the vectors in `part` whose priority is below `keep` * 2**64 (all of them when `keep` is 1).

        Priorities and positions do not depend on `keep` or on how the source was sliced. `reject` is called for each
        bad vector and may raise to end the run.
        """
