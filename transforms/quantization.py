# SPDX-License-Identifier: Apache-2.0
"""The `binary` encoder's bits: what the k-NN plugin turns float vectors into before faiss sees them.

Formulas: `QuantizerHelper.calculateThresholds` and `BitPacker.quantizeAndPackBits` of the plugin. The plugin takes
  the thresholds of each page of training vectors from that page; here they come from the whole sample. A segment's
  thresholds are its own in any case, and the random rotation that a segment may apply is not applied to training
  vectors, here or there.
"""

from __future__ import annotations

import numpy as np

_ROWS = 4096


def thresholds(vectors: np.ndarray, bits: int) -> np.ndarray:
    """(bits, d) float32: mean + (-1 + 2 (b + 1) / (bits + 1)) * standard deviation of each column of (n, d) `vectors`.

    One bit is cut at the mean: its coefficient is zero.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    square = np.zeros_like(mean)
    for start in range(0, len(vectors), _ROWS):
        part = vectors[start : start + _ROWS] - mean
        square += np.einsum("ij,ij->j", part, part)
    deviation = np.sqrt(square / len(vectors))
    coefficients = -1 + 2 * (np.arange(bits) + 1) / (bits + 1)
    return (mean + coefficients[:, None] * deviation).astype(np.float32)


def pack(vectors: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(n, ceil(bits d / 8)) uint8: a 1 for each bit and then each dimension above its limit, the first bit highest.

    Args:
      vectors: (n, d) float32.
      limits: (bits, d) from `thresholds`.
    """
    bits, dimension = limits.shape
    packed = np.empty((len(vectors), -(-bits * dimension // 8)), np.uint8)
    for start in range(0, len(vectors), _ROWS):
        part = vectors[start : start + _ROWS]
        above = part[:, None, :] > limits
        packed[start : start + len(part)] = np.packbits(above.reshape(len(part), bits * dimension), axis=1)
    return packed
