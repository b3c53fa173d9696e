# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from apache_beam import coders

from transforms.vectors import MAX_BLOCK_BYTES, VectorBlock, VectorBlockCoder, block_rows


@pytest.mark.parametrize("dtype", ["<f4", "i1", "u1"])
@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_coder_round_trip(dtype: str, rows: int) -> None:
    priorities = np.arange(rows, dtype=np.uint64) << np.uint64(40)
    block = VectorBlock(priorities, np.ones((rows, 7), dtype) * 3, np.linspace(0, 1, rows, dtype=np.float32))
    encoded = VectorBlockCoder().encode(block)
    decoded = VectorBlockCoder().decode(encoded)
    assert decoded == block
    assert decoded.vectors.dtype == np.dtype(dtype)
    assert len(encoded) == VectorBlockCoder().estimate_size(block)


def test_coder_is_registered() -> None:
    assert isinstance(coders.registry.get_coder(VectorBlock), VectorBlockCoder)


def test_coder_refuses_another_version() -> None:
    block = VectorBlock(np.zeros(1, np.uint64), np.zeros((1, 2), np.float32), np.zeros(1, np.float32))
    encoded = bytearray(VectorBlockCoder().encode(block))
    encoded[0] = 9
    with pytest.raises(ValueError, match="version 9, expected 2"):
        VectorBlockCoder().decode(bytes(encoded))


def test_block_says_all_shapes() -> None:
    with pytest.raises(ValueError, match=r"block of \(3,\) priorities, \(2, 4\) vectors and \(2,\) positions"):
        VectorBlock(np.zeros(3, np.uint64), np.zeros((2, 4), np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"block of \(2,\) priorities, \(2, 4\) vectors and \(3,\) positions"):
        VectorBlock(np.zeros(2, np.uint64), np.zeros((2, 4), np.float32), np.zeros(3, np.float32))


@pytest.mark.parametrize("row_bytes", [1, 512, 3072, 64_000, 8_000_000])
def test_a_full_block_fits_four_megabytes(row_bytes: int) -> None:
    rows = block_rows(row_bytes)
    assert rows >= 1
    assert rows == 1 or rows * (row_bytes + 12) <= MAX_BLOCK_BYTES < (rows + 1) * (row_bytes + 12)
