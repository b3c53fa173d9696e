# SPDX-License-Identifier: Apache-2.0
"""Target versions: which OpenSearch a model is for, and which rules of the Train API depend on it."""

from __future__ import annotations

import re

from transforms.errors import RequestError

Version = tuple[int, int, int]

NEWEST_TARGET = "3.6.0"  # newest version the tests run against; 2.19.1 is the oldest
OLDEST_TARGET: Version = (2, 17, 0)

# (first version with the rule, the rule). Read from the plugin's source at every tag from 2.17.0.0 to 3.8.0.0.
VERSION_RULES: tuple[tuple[str, str], ...] = (
    ("2.18.0", "space_type is accepted at the top level (before: only spaceType)"),
    ("2.18.0", "a method without an engine means faiss (before: nmslib, which cannot train)"),
    ("2.18.0", "compression_level is derived from PQ's m and code_size when both are given"),
    ("2.19.0", "mode and compression_level may stand beside method"),
    ("2.19.0", "space_type cosinesimil is supported"),
    ("2.19.0", "training needs max(nlist, 2^code_size) documents for IVF with a given code_size, otherwise 1000"),
    ("2.19.0", "dimension must be divisible by hnsw's m, its default 16 included"),
    ("3.0.0", "training needs 2^code_size documents with PQ (1000 when code_size is not given), otherwise no minimum"),
    ("3.0.0", "dimension must be divisible by hnsw's m only when m is given"),
    ("3.1.0", "compression_level 1x is accepted with mode on_disk"),
    ("3.2.0", "the binary encoder has random_rotation and enable_adc (enable_adc with 1 bit only)"),
    ("3.3.0", "engine is accepted at the top level"),
    ("3.3.0", "compression_level 4x is refused as lucene's alone, unless method names an engine"),
    ("3.3.0", "engine null or undefined in method is refused, unless it stands at the top level too"),
    ("3.5.0", "space_type cosinesimil is refused for byte vectors"),
    ("3.6.0", "the sq encoder has bits, which must be given for float vectors"),
    ("3.6.0", "mode on_disk and compression_level 32x stand for sq with 1 bit (before: the binary encoder with 1 bit)"),
)


def parse_version(text: str) -> Version:
    """`3.6`, `3.6.0` or `3.6.0-SNAPSHOT` as (3, 6, 0). Raises RequestError. Versions yet unknown are accepted."""
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-[A-Za-z0-9.]+)?", text.strip())
    if match is None:
        raise RequestError(f'target version "{text}" is not a version; give it as {NEWEST_TARGET}')
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if version < OLDEST_TARGET:
        raise RequestError(f"target version {text} is too old: {show_version(OLDEST_TARGET)} is the oldest supported")
    return version


def show_version(version: Version) -> str:
    """(3, 6, 0) as `3.6.0`."""
    return ".".join(map(str, version))
