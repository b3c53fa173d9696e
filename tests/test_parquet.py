# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that

from transforms import parquet
from transforms.errors import RequestError, TrainingError
from transforms.parquet import ParquetVectors, ReadVectorsFromParquet
from transforms.vectors import MAX_BLOCK_BYTES, RejectedVector

ROWS, D = 1_000, 8
VECTORS = np.random.default_rng(0).integers(-100, 100, (ROWS, D)).astype(np.float32)


def write(path: Path, column: pa.Array, name: str = "v", row_group_size: int = 300, **options: Any) -> str:
    table = pa.table({"id": pa.array(range(len(column))), name: column})
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return str(path)


def rows_of(vectors: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(vectors.tolist(), kind)


def read_all(source: ParquetVectors, keep: float = 1.0) -> tuple[np.ndarray, np.ndarray, list[RejectedVector]]:
    rejected: list[RejectedVector] = []
    blocks = [block for part in source.slices() for block in source.read(part, keep, rejected.append)]
    priorities = np.concatenate([block.priorities for block in blocks]) if blocks else np.empty(0)
    vectors = np.concatenate([block.vectors for block in blocks]) if blocks else np.empty((0, D))
    return priorities, vectors, rejected


KINDS = {
    "list<float>": pa.list_(pa.float32()),
    "list<double>": pa.list_(pa.float64()),
    "list<int16>": pa.list_(pa.int16()),
    "large_list<float>": pa.large_list(pa.float32()),
    "fixed_size_list<float>": pa.list_(pa.float32(), D),
    "fixed_size_list<halffloat>": pa.list_(pa.float16(), D),
    "fixed_size_list<int8>": pa.list_(pa.int8(), D),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reads_every_kind_of_list_exactly(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", rows_of(VECTORS, kind))
    _, vectors, rejected = read_all(ParquetVectors(path, "v", D))
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, VECTORS)
    assert not rejected


def test_byte_and_binary_vectors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows_of(VECTORS.astype(np.int8), pa.list_(pa.int8())))
    _, vectors, _ = read_all(ParquetVectors(path, "v", D, "byte"))
    assert vectors.dtype == np.int8
    assert np.array_equal(vectors, VECTORS.astype(np.int8))
    _, vectors, _ = read_all(ParquetVectors(path, "v", 8 * D, "binary"))
    assert vectors.dtype == np.uint8
    assert np.array_equal(vectors, VECTORS.astype(np.int8).view(np.uint8))
    path = write(tmp_path / "b.parquet", rows_of(VECTORS.astype(np.int8).view(np.uint8), pa.list_(pa.uint8())))
    assert np.array_equal(read_all(ParquetVectors(path, "v", 8 * D, "binary"))[1], vectors)


@pytest.mark.parametrize("kind", ["list", "fixed"])
def test_nulls_are_passed_over(tmp_path: Path, kind: str) -> None:
    values = [None if i % 3 == 0 else row.tolist() for i, row in enumerate(VECTORS)]
    column = pa.array(values, pa.list_(pa.float32()) if kind == "list" else pa.list_(pa.float32(), D))
    _, vectors, rejected = read_all(ParquetVectors(write(tmp_path / "a.parquet", column), "v", D))
    assert np.array_equal(vectors, VECTORS[np.arange(ROWS) % 3 != 0])
    assert not rejected


def test_nested_column_with_null_parents(tmp_path: Path) -> None:
    inner = [None if i == 5 else {"vec": None if i == 6 else row.tolist()} for i, row in enumerate(VECTORS)]
    outer = pa.array([{"a": each} for each in inner], pa.struct({"a": pa.struct({"vec": pa.list_(pa.float32())})}))
    path = write(tmp_path / "a.parquet", outer, "doc")
    _, vectors, _ = read_all(ParquetVectors(path, "doc.a.vec", D))
    assert np.array_equal(vectors, np.delete(VECTORS, [5, 6], axis=0))


def test_bad_rows_name_file_row_and_lengths(tmp_path: Path) -> None:
    values = [row.tolist() for row in VECTORS]
    values[7] = [1.0, 2.0]
    values[400] = [float("nan")] * D
    values[401][3] = None
    values[999] = [3.5e38] * D  # more than a float32 holds
    path = write(tmp_path / "a.parquet", pa.array(values, pa.list_(pa.float64())))
    _, vectors, rejected = read_all(ParquetVectors(path, "v", D))
    assert [(bad.source, bad.row, bad.reason) for bad in rejected] == [
        (path, "row 7", f"length 2, expected {D}"),
        (path, "row 401", "an element is null"),
        (path, "row 400", "an element is NaN or infinite as float32"),
        (path, "row 999", "an element is NaN or infinite as float32"),
    ]
    assert np.array_equal(vectors, np.delete(VECTORS, [7, 400, 401, 999], axis=0))


def test_bytes_out_of_range_are_bad(tmp_path: Path) -> None:
    values = VECTORS.astype(int).tolist()
    values[3][0] = 128
    path = write(tmp_path / "a.parquet", pa.array(values, pa.list_(pa.int32())))
    _, vectors, rejected = read_all(ParquetVectors(path, "v", D, "byte"))
    assert [(bad.row, bad.reason) for bad in rejected] == [("row 3", "an element is outside [-128, 127]")]
    assert len(vectors) == ROWS - 1


def test_thinning_keeps_exactly_the_low_priorities(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows_of(VECTORS, pa.list_(pa.float32())))
    source = ParquetVectors(path, "v", D, seed=5)
    priorities, vectors, _ = read_all(source)
    some, few, _ = read_all(source, 0.2)
    low = priorities < 0.2 * 2.0**64
    assert 100 < low.sum() < 300
    assert np.array_equal(some, priorities[low])
    assert np.array_equal(few, vectors[low])


def test_a_bad_row_that_is_not_sampled_is_not_looked_at(tmp_path: Path) -> None:
    values = [row.tolist() for row in VECTORS]
    path = write(tmp_path / "a.parquet", pa.array(values, pa.list_(pa.float32())))
    priorities, _, _ = read_all(ParquetVectors(path, "v", D))
    values[int(np.argmax(priorities))] = [1.0]
    write(tmp_path / "a.parquet", pa.array(values, pa.list_(pa.float32())))
    assert read_all(ParquetVectors(path, "v", D), 0.5)[2] == []
    assert len(read_all(ParquetVectors(path, "v", D), 1.0)[2]) == 1


def test_slices_hold_each_row_once_and_do_not_change_priorities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.parquet", rows_of(VECTORS + number, pa.list_(pa.float32())), row_group_size=70)
    pattern = str(tmp_path / "*.parquet")
    whole = read_all(ParquetVectors(pattern, "v", D))
    assert len(ParquetVectors(pattern, "v", D).slices()) == 3
    monkeypatch.setattr(parquet, "SLICE_BYTES", 150 * D * 4)
    source = ParquetVectors(pattern, "v", D)
    assert len(source.slices()) == 3 * 5
    assert all(np.array_equal(a, b) for a, b in zip(read_all(source)[:2], whole[:2], strict=True))


def test_a_copy_elsewhere_gives_the_same_priorities(tmp_path: Path) -> None:
    (tmp_path / "one" / "x").mkdir(parents=True)
    write(tmp_path / "one" / "x" / "a.parquet", rows_of(VECTORS, pa.list_(pa.float32())))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, second = (read_all(ParquetVectors(f"{tmp_path}/{d}/x/*.parquet", "v", D))[0] for d in ("one", "two"))
    assert np.array_equal(first, second)
    alone = read_all(ParquetVectors(f"{tmp_path}/two/x/a.parquet", "v", D))[0]
    assert np.array_equal(first, alone)
    assert not np.array_equal(first, read_all(ParquetVectors(f"{tmp_path}/two/x/*.parquet", "v", D, seed=1))[0])


def test_blocks_stay_below_four_megabytes(tmp_path: Path) -> None:
    vectors = np.zeros((3_000, 768), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 768)
    source = ParquetVectors(write(tmp_path / "a.parquet", column, row_group_size=3_000), "v", 768)
    blocks = [block for part in source.slices() for block in source.read(part, 1.0, lambda bad: None)]
    assert sum(map(len, blocks)) == 3_000
    assert max(block.vectors.nbytes + block.priorities.nbytes for block in blocks) <= MAX_BLOCK_BYTES


def test_summary_counts_rows_from_the_footers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows_of(VECTORS, pa.list_(pa.float32())))
    summary = ParquetVectors(path, "v", D).summary()
    assert (summary.count, summary.reader) == (ROWS, "parquet, 1 file")
    assert 0 < summary.row_bytes < 4 * D + 8  # of the vector column alone


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), D)], ids=["list", "fixed-size list"])
def test_summary_does_not_count_nulls(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [row if number % 10 == 0 else None for number, row in enumerate(VECTORS.tolist())]
    write(tmp_path / "a.parquet", pa.array(rows, kind), row_group_size=33)
    write(tmp_path / "b.parquet", pa.array([{"w": row} for row in rows] + [None], pa.struct([("w", kind)])))
    vectors = sum(row is not None for row in rows)
    assert ParquetVectors(str(tmp_path / "a.parquet"), "v", D).summary().count == vectors
    assert ParquetVectors(str(tmp_path / "b.parquet"), "v.w", D).summary().count == vectors


def test_summary_counts_bad_vectors_and_what_it_cannot_know(tmp_path: Path) -> None:
    good, holes = [1.0] * D, [1.0] * (D - 1) + [None]
    bad = write(tmp_path / "a.parquet", pa.array([good, holes, None, good], pa.list_(pa.float32())))
    assert ParquetVectors(bad, "v", D).summary().count == 3
    unknown = write(tmp_path / "b.parquet", pa.array([good, None], pa.list_(pa.float32())), write_statistics=False)
    assert ParquetVectors(unknown, "v", D).summary().count == 2


def test_source_is_pickled_without_its_footers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows_of(VECTORS, pa.list_(pa.float32())))
    source = ParquetVectors(path, "v", D)
    before = len(pickle.dumps(source))
    source.summary()
    assert len(pickle.dumps(source)) == before
    assert pickle.loads(pickle.dumps(source)) == source


@pytest.mark.parametrize(
    ("pattern", "column", "dimension", "data_type", "message"),
    [
        ("none*.parquet", "v", D, "float", "no Parquet file matches '.*none\\*.parquet'"),
        ("a.parquet", "w", D, "float", "no column 'w' in .*a.parquet; its columns are id, v"),
        ("a.parquet", "v.x", D, "float", "no column 'v.x' in .*; its columns are id, v"),
        ("a.parquet", "id", D, "float", "column 'id' of .* is int64, expected a list of floats or integers"),
        ("a.parquet", "v", D, "byte", "column 'v' of .* is .*, expected integers for data_type byte"),
        ("b.parquet", "v", 9, "float", "has vectors of length 8, expected 9 \\(dimension 9, data_type float\\)"),
        ("c.parquet", "v", D, "float", "column 'v' of .* is list<.*string>, expected a list of floats or integers"),
    ],
)
def test_what_does_not_fit_is_refused_before_reading(
    tmp_path: Path, pattern: str, column: str, dimension: int, data_type: str, message: str
) -> None:
    write(tmp_path / "a.parquet", rows_of(VECTORS, pa.list_(pa.float32())))
    write(tmp_path / "b.parquet", rows_of(VECTORS, pa.list_(pa.float32(), D)))
    write(tmp_path / "c.parquet", pa.array([["x"]]))
    with pytest.raises(RequestError, match=message):
        ParquetVectors(str(tmp_path / pattern), column, dimension, data_type).summary()


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR0 nothing of the kind")
    with pytest.raises(TrainingError, match=r"cannot read .*a.parquet"):
        ParquetVectors(str(tmp_path / "a.parquet"), "v", D).summary()


def test_transform(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows_of(VECTORS, pa.list_(pa.float32())))

    def check(blocks: list) -> None:
        assert np.array_equal(np.concatenate([block.vectors for block in blocks]), VECTORS)

    with beam.Pipeline("FnApiRunner") as p:
        assert_that(p | ReadVectorsFromParquet(path, "v", D), check)


def test_transform_fails_at_the_first_bad_vector(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array([[1.0] * D, [1.0]], pa.list_(pa.float32())))
    message = r"1 bad vector, 0 allowed .*a.parquet row 1: length 1, expected 8"
    with pytest.raises(RuntimeError, match=message), beam.Pipeline("FnApiRunner") as p:
        p | ReadVectorsFromParquet(path, "v", D)


def test_display_data() -> None:
    assert ReadVectorsFromParquet("*.parquet", "v", D).display_data() == {
        "pattern": "*.parquet",
        "column": "v",
        "dimension": D,
        "data_type": "float",
    }


def test_positions_are_shares_of_all_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list = VECTORS.tolist()
    rows[5] = None
    write(tmp_path / "a.parquet", rows_of(VECTORS[:200], pa.list_(pa.float32())))
    write(tmp_path / "b.parquet", pa.array(rows[200:] + rows[:200], pa.list_(pa.float32())))
    expected = np.delete(np.arange(1_200), 200 + 800 + 5) / np.float32(1_200)

    def positions(keep: float) -> np.ndarray:
        source = ParquetVectors(str(tmp_path / "*.parquet"), "v", D)
        blocks = [block for part in source.slices() for block in source.read(part, keep, lambda bad: None)]
        assert {block.positions.dtype for block in blocks} == {np.dtype(np.float32)}
        return np.concatenate([block.positions for block in blocks])

    whole, some = positions(1.0), positions(0.3)
    assert np.allclose(whole, expected)
    assert np.isin(some, whole).all()
    monkeypatch.setattr("transforms.parquet.SLICE_BYTES", 1)
    assert np.array_equal(positions(1.0), whole)
