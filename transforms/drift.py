# SPDX-License-Identifier: Apache-2.0
"""Drift: whether the vectors of a source change along its order, and whether a model fits all of them alike.

Plain numpy. A source that was written over months may end with other vectors than it began with. A uniform sample has
some of all, and so shows it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Parts that the source is looked at in, and the vectors that each must have.
_PARTS, _FEWEST = 20, 50


def drift(
    positions: np.ndarray, vectors: np.ndarray, errors: np.ndarray, lengths: np.ndarray | None
) -> dict[str, Any] | None:
    """Vectors in the order of their source, in parts of about equal number.

    Args:
      positions: (n,) shares of the source that come before each vector.
      vectors: (n, dimension) floats, or (n, dimension / 8) packed bits as uint8.
      errors: (n,) what the model loses of each.
      lengths: (n,) of the vectors as they were read, None where they are not known or mean nothing.

    Returns:
      None for fewer than 100 vectors or where all have one position. Else, for each part: `position`, the middle of
      it; `error`, the mean, and `length`, as ratios to the mean of all; and `standard_error`, that of the ratios of
      `error`. And `explained`, the share of the vectors' squared spread that the parts' means account for, less what
      chance makes of it (the omega-squared of a one-way analysis of variance with all coordinates taken together).
    """
    count = min(_PARTS, len(positions) // _FEWEST)
    if count < 2 or positions.min() == positions.max():
        return None
    parts = np.array_split(np.argsort(positions, kind="stable"), count)

    def ratios(values: np.ndarray) -> list[float]:
        mean = values.mean(dtype=np.float64) or 1.0
        return [float(values[part].mean(dtype=np.float64) / mean) for part in parts]

    told: dict[str, Any] = {
        "position": [float(np.median(positions[part])) for part in parts],
        "error": ratios(errors),
        "standard_error": [
            float(errors[part].std(dtype=np.float64) / np.sqrt(len(part)) / (errors.mean(dtype=np.float64) or 1.0))
            for part in parts
        ],
        "explained": _explained(vectors, parts),
    }
    if lengths is not None:
        told["length"] = ratios(lengths)
    return told


def _explained(vectors: np.ndarray, parts: list[np.ndarray]) -> float:
    packed = vectors.dtype == np.uint8
    means, inside = [], 0.0
    for part in parts:
        rows = (np.unpackbits(vectors[part], axis=1) if packed else vectors[part]).astype(np.float64)
        means.append(rows.mean(axis=0))
        inside += float(((rows - means[-1]) ** 2).sum())
    sizes = [len(part) for part in parts]
    between = float(sizes @ ((means - np.average(means, axis=0, weights=sizes)) ** 2).sum(axis=1))
    chance = inside / (len(vectors) - len(parts))  # what one part less would bring by itself
    total = between + inside + chance
    return max(0.0, (between - (len(parts) - 1) * chance) / total) if total else 0.0
