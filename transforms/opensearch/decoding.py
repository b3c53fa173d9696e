# SPDX-License-Identifier: Apache-2.0
"""Search responses to arrays, without a Python object per number and, for CBOR, without one per hit.

The pages come from requests that `transforms.opensearch.pages` builds: every hit has a `_score` (the random draw), a
`sort` value (the `_seq_no`) and the vector. In CBOR all hits of a page have the same bytes apart from these three
values, like

    {"_index": "my-index", "_score": fa 3f18 7749, "fields": {"v": [59 0200 .. 512 bytes ..]}, "sort": [1a 0001 86a0]}

so a run of hits is read as an array of fixed-size records whose constant bytes are compared with those of the first.
The run ends where the `_seq_no` needs more bytes. Anything unusual is decoded by `cbor2`, slowly and completely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cbor2
import numpy as np
import simdjson

from transforms.opensearch.session import check_shards

#: Draws are multiples of 2**-24: `random_score` keeps 24 bits of a hash.
DRAWS = 1 << 24

#: Nested objects of one document that can be told apart.
ORDINALS = 1 << 20

_HITS = b"\x64hits\x9f"
_SCORE = b"\x66_score\xfa"
_SORT = b"\xff\xff\x64sort\x9f"
_END_OF_HIT = b"\xff\xff"
_NOT_FINITE = "holds NaN or infinity"
_BREAK = 0xFF
#: CBOR's first byte of an unsigned integer: the bytes that follow.
_INTEGER_BYTES = {24: 1, 25: 2, 26: 4, 27: 8}


@dataclass
class Page:
    """One page of hits in ascending `_seq_no`.

    Attributes:
      hits: documents in the page, also those without a usable vector.
      last: `_seq_no` of the last one, -1 in an empty page.
      pit_id: of the point in time to use from now on.
      rows: (n,) uint64 that identify the vectors in their shard: `_seq_no`, or for nested objects
        `_seq_no` * ORDINALS + place in the document.
      draws: (n,) uint64 below DRAWS; not meaningful for nested objects.
      vectors: (n, columns) float32, int8 or uint8.
      bad: (`_seq_no`, reason) of vectors that cannot be used.
      size: bytes of the response.
    """

    hits: int
    last: int
    pit_id: str | None
    rows: np.ndarray
    draws: np.ndarray
    vectors: np.ndarray
    bad: list[tuple[int, str]] = field(default_factory=list)
    size: int = 0


def decode_cbor(data: bytes, key: str, columns: int, dtype: np.dtype) -> Page:
    """A page whose hits hold their vector as one byte string of little-endian values in `fields.<key>`.

    Raises:
      PartialResult: not every shard answered.
      ValueError: the page is cut short or is not CBOR.
    """
    first = data.find(_HITS) + len(_HITS)
    if first < len(_HITS):
        return _decode_unusual(data, key, columns, dtype)
    after_score = b"\x66fields\xbf" + cbor2.dumps(key) + b"\x9f" + _byte_string_head(columns * dtype.itemsize)
    runs = []
    position = first
    while data[position : position + 1] not in (b"", b"\xff"):
        run = _run(data, position, after_score, columns, dtype)
        if run is None:
            return _decode_unusual(data, key, columns, dtype)
        runs.append(run)
        position += len(run) * run.dtype.itemsize
    # What is left without the hits is small: the shards, the point in time, the ends of the maps.
    envelope = _loads(data[:first] + data[position:])
    check_shards(envelope)
    hits = sum(map(len, runs))
    if not hits:
        return _empty(envelope, columns, dtype)
    rows = np.concatenate([run["row"].astype(np.uint64) for run in runs])
    draws = np.concatenate([_whole_draws(run["score"]) for run in runs])
    # Concatenating copies out of the page, which can then be freed.
    vectors = np.concatenate([run["vector"].reshape(len(run), columns) for run in runs])
    page = Page(hits, int(rows[-1]), envelope.get("pit_id"), rows, draws, vectors)
    if dtype.kind == "f":
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            page.bad = [(row, _NOT_FINITE) for row in rows[~finite].tolist()]
            page.rows, page.draws, page.vectors = rows[finite], draws[finite], vectors[finite]
    return page


def _run(data: bytes, start: int, after_score: bytes, columns: int, dtype: np.dtype) -> np.ndarray | None:
    """Records of the hits from `start` that look like the first one; None if that one is unusual."""
    score = data.find(_SCORE, start, start + 1024) + len(_SCORE)
    middle = score + 4
    vector = middle + len(after_score)
    tail = vector + columns * dtype.itemsize
    head = tail + len(_SORT)
    if (
        score < len(_SCORE)
        or not data.startswith(after_score, middle)
        or not data.startswith(_SORT, tail)
        or head >= len(data)
    ):
        return None
    extra = _INTEGER_BYTES.get(data[head], 0)
    if data[head] > 27 or not data.startswith(_END_OF_HIT, head + 1 + extra):
        return None
    size = head + 1 + extra + len(_END_OF_HIT) - start
    constant = {
        "before": (start, score),
        "middle": (middle, vector),
        "tail": (tail, head),
        "end": (start + size - 2, start + size),
    }
    fields: dict[str, tuple[Any, int]] = {
        name: ((np.uint8, (stop - begin,)), begin - start) for name, (begin, stop) in constant.items()
    }
    fields["score"] = (">f4", score - start)
    fields["vector"] = ((dtype, (columns,)), vector - start)
    fields["head"] = (np.uint8, head - start)
    fields["row"] = (f">u{extra}", head + 1 - start) if extra else (np.uint8, head - start)
    record = np.dtype(
        {
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": size,
        }
    )
    records = np.frombuffer(data, record, (len(data) - start) // size, start)
    same = records["head"] == data[head] if extra else records["head"] < 24
    for name, (begin, stop) in constant.items():
        same &= (records[name] == np.frombuffer(data, np.uint8, stop - begin, begin)).all(axis=1)
    return records if same.all() else records[: int(np.argmin(same))]


def _decode_unusual(data: bytes, key: str, columns: int, dtype: np.dtype) -> Page:
    """Any page, hit by hit: vectors that are missing or too long, other layouts."""
    found = _loads(data)
    check_shards(found)
    builder = _Builder(columns, dtype)
    for hit in found["hits"]["hits"]:
        row = int(hit["sort"][0])
        builder.hit(row)
        value = (hit.get("fields", {}).get(key) or [None])[0]
        if not isinstance(value, bytes):
            builder.bad.append((row, f"no bytes in {key}"))
        elif len(value) != columns * dtype.itemsize:
            builder.bad.append((row, f"length {len(value) / dtype.itemsize:g}, expected {columns}"))
        else:
            builder.add(row, row, hit["_score"], np.frombuffer(value, dtype))
    return builder.page(found)


def decode_json(data: bytes, path: str, columns: int, dtype: np.dtype, nested: bool) -> Page:
    """A page whose hits hold arrays of numbers in `_source`, one a document or (`nested`) one an object.

    Raises: as `decode_cbor`.
    """
    found: Any = simdjson.Parser().parse(data)
    if "error" in found:
        raise ValueError("the response is an error")
    check_shards({name: _plain(found[name]) for name in ("_shards", "timed_out") if name in found})
    pointer = "/_source/" + path.replace("~", "~0").replace(".", "/")
    builder = _Builder(columns, dtype)
    for hit in found["hits"]["hits"]:
        row = int(hit["sort"][0])
        builder.hit(row)
        if nested:
            for ordinal, value in enumerate(_leaves(hit["_source"], path)):
                builder.add_json(row, row * ORDINALS + ordinal, 0.0, value)
            continue
        try:
            value = hit.at_pointer(pointer)
        except (KeyError, TypeError, ValueError):
            # The document may write the path with dots or through an array of one object.
            value = next(_leaves(hit["_source"], path), None)
        builder.add_json(row, row, hit["_score"], value)
    return builder.page({"pit_id": found.get("pit_id")})


class _Builder:
    """Gathers a page hit by hit."""

    def __init__(self, columns: int, dtype: np.dtype):
        self.bad: list[tuple[int, str]] = []
        self._columns = columns
        self._dtype = dtype
        self._hits = 0
        self._last = -1
        self._rows: list[int] = []
        self._scores: list[float] = []
        self._vectors: list[np.ndarray] = []

    def hit(self, row: int) -> None:
        self._hits += 1
        self._last = max(self._last, row)

    def add(self, document: int, row: int, score: float, vector: np.ndarray) -> None:
        if vector.dtype.kind == "f" and not np.isfinite(vector).all():
            self.bad.append((document, _NOT_FINITE))
            return
        self._rows.append(row)
        self._scores.append(score)
        self._vectors.append(vector)

    def add_json(self, document: int, row: int, score: float, value: Any) -> None:
        if not isinstance(value, simdjson.Array):
            self.bad.append((document, "no array of numbers in _source"))
            return
        try:
            numbers = np.frombuffer(value.as_buffer(of_type="d"), "<f8")
        except (TypeError, ValueError):
            self.bad.append((document, "not an array of numbers"))
            return
        if len(numbers) != self._columns:
            self.bad.append((document, f"length {len(numbers)}, expected {self._columns}"))
            return
        if self._dtype.kind == "f":
            with np.errstate(over="ignore"):  # an infinity is found below
                self.add(document, row, score, numbers.astype(self._dtype))
            return
        # Binary vectors are written as signed bytes too.
        signed = numbers.astype(np.int16)
        if (signed != numbers).any() or (signed < -128).any() or (signed > 127).any():
            self.bad.append((document, "values that are not integers from -128 to 127"))
            return
        self.add(document, row, score, signed.astype(np.int8).view(self._dtype))

    def page(self, envelope: Any) -> Page:
        if not self._vectors:
            page = _empty(envelope, self._columns, self._dtype)
        else:
            rows = np.array(self._rows, np.uint64)
            scores = np.array(self._scores, np.float64)
            page = Page(0, 0, envelope.get("pit_id"), rows, _whole_draws(scores), np.stack(self._vectors))
        page.hits, page.last, page.bad = self._hits, self._last, self.bad
        return page


def _empty(envelope: Any, columns: int, dtype: np.dtype) -> Page:
    none = np.empty(0, np.uint64)
    return Page(0, -1, envelope.get("pit_id"), none, none, np.empty((0, columns), dtype))


def _whole_draws(scores: np.ndarray) -> np.ndarray:
    # JSON has the shortest digits of a float32, which are not its exact value.
    return (scores.astype(np.float32) * np.float32(DRAWS)).astype(np.uint64)


def _leaves(node: Any, path: str) -> Iterator[Any]:
    """Values under a dotted path, as objects in objects, dots in names or arrays of objects."""
    if not path:
        if node is not None:
            yield node
    elif isinstance(node, simdjson.Array):
        for item in node:
            yield from _leaves(item, path)
    elif isinstance(node, simdjson.Object):
        for name in node.keys():  # noqa: SIM118  items() would turn every value into Python objects
            if path == name:
                yield from _leaves(node[name], "")
            elif path.startswith(name + "."):
                yield from _leaves(node[name], path[len(name) + 1 :])


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Object):
        return value.as_dict()
    return value


def _loads(data: bytes) -> Any:
    try:
        return cbor2.loads(data)
    except (cbor2.CBORDecodeError, EOFError) as error:
        raise ValueError(f"not a complete CBOR page: {error}") from None


def _byte_string_head(length: int) -> bytes:
    return cbor2.dumps(bytes(length))[:-length]
