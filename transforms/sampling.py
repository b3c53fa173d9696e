# SPDX-License-Identifier: Apache-2.0
"""How vectors are sampled: each has a pseudo-random priority, and the `size` smallest priorities are the sample.

Bottom-k by a hash priority is a reservoir whose result does not depend on the order of arrival: it is uniform without
replacement, the same for a seed over runners, slicings, bundles and retries, and it merges (Cohen and Kaplan, "Summarizing
data using bottom-k sketches", PODC 2007).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

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
      (n,) uint64, uniform over the 64-bit range and distinct for distinct rows: the finalizer of SplitMix64 (Steele, Lea and
      Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) is a bijection.
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
