# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from transforms.drift import drift
from transforms.findings import _about_drift

RNG = np.random.default_rng(4)
N, D = 4_000, 8
POSITIONS = RNG.permutation(N).astype(np.float32) / N
VECTORS = RNG.standard_normal((N, D)).astype(np.float32)
ERRORS = RNG.exponential(1, N).astype(np.float32)


def test_vectors_that_do_not_change() -> None:
    told = drift(POSITIONS, VECTORS, ERRORS, np.linalg.norm(VECTORS, axis=1))
    assert told is not None
    assert len(told["position"]) == len(told["error"]) == len(told["length"]) == len(told["standard_error"]) == 20
    assert told["position"] == pytest.approx(np.linspace(0.025, 0.975, 20), abs=0.001)
    assert told["error"] == pytest.approx([1] * 20, abs=0.3)
    assert told["length"] == pytest.approx([1] * 20, abs=0.1)
    assert told["explained"] < 0.002
    assert told["standard_error"] == pytest.approx([200**-0.5] * 20, rel=0.5)
    assert _about_drift(told) == []


def test_vectors_that_move() -> None:
    """Half of the spread of each coordinate is where in the source a vector is."""
    moving = VECTORS + np.sqrt(12) * POSITIONS[:, None]
    told = drift(POSITIONS, moving, ERRORS * (1 + 3 * POSITIONS), None)
    assert told is not None
    assert told["explained"] == pytest.approx(0.5, abs=0.02)
    assert "length" not in told
    assert told["error"][0] < 0.6
    assert told["error"][-1] > 1.3
    ((weight, text),) = _about_drift(told)
    assert weight == pytest.approx(told["error"][-1] - 1)
    assert text.startswith(f"The last vectors of the source have {told['error'][-1]:.2f} times the mean error")


def test_means_are_those_of_the_parts() -> None:
    told = drift(np.repeat([0.75, 0.25], 50), VECTORS[:100], np.repeat([3.0, 1.0], 50), np.repeat([1.0, 2.0], 50))
    assert told is not None
    assert told["position"] == [0.25, 0.75]
    assert told["error"] == [0.5, 1.5]
    assert told["length"] == pytest.approx([4 / 3, 2 / 3])
    assert told["standard_error"] == [0, 0]


def test_packed_bits_drift_too() -> None:
    bits = RNG.random((N, 16)) < np.linspace(0, 1, N)[np.argsort(np.argsort(POSITIONS))][:, None]
    told = drift(POSITIONS, np.packbits(bits, axis=1), ERRORS, None)
    assert told is not None
    assert told["explained"] == pytest.approx(1 / 3, abs=0.02)  # 1/12 of the variance of 1/4


@pytest.mark.parametrize("positions", [POSITIONS[:99], np.zeros(N, np.float32)])
def test_what_says_nothing(positions: np.ndarray) -> None:
    assert drift(positions, VECTORS[: len(positions)], ERRORS[: len(positions)], None) is None


def test_vectors_that_are_all_the_same() -> None:
    told = drift(POSITIONS, np.ones_like(VECTORS), np.zeros_like(ERRORS), np.zeros(N))
    assert told is not None
    assert told["explained"] == 0
    assert told["error"] == told["length"] == [0.0] * 20
