# SPDX-License-Identifier: Apache-2.0
"""What a page of vectors is asked for with: the query, which draws a random number for each document, and the reader.

`random_score` over `_seq_no` is a hash of (seed, index name, shard, `_seq_no`), the same on every replica, for every
slicing and for every version that was tried (2.19.1, 3.6.0). It becomes the upper 24 bits of the vector's priority, so
that the server itself can leave out (`min_score`) the documents whose priority is too high for the sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from transforms.opensearch.decoding import DRAWS, Page, decode_cbor, decode_json
from transforms.opensearch.session import CBOR, JSON
from transforms.sampling import priority, stream_key
from transforms.vectors import NUMPY_TYPES, columns

#: Readers from the cheapest for the cluster to the one that always works. Server time for 128 floats: 3, 5 and 80
#: microseconds.
READERS = ("docvalues", "script", "source")

#: Name of the script field: one letter, it comes back with every hit.
_SCRIPT_FIELD = "v"

# The getter may return a buffer that Lucene reuses for the next document (index.knn: true): without the copy every hit
# of a segment has the vector of the last. Bytes are a fifth smaller in CBOR than a float[], which has a type byte for
# each number.
_FLOAT_SCRIPT = (
    "float[] s = (float[]) doc[params.f].value; byte[] r = new byte[4 * s.length]; "
    "for (int i = 0, j = 0; i < s.length; ++i) { int b = Float.floatToRawIntBits(s[i]); "
    "r[j++] = (byte) b; r[j++] = (byte) (b >> 8); r[j++] = (byte) (b >> 16); r[j++] = (byte) (b >> 24); } return r;"
)
# Without index.knn the array is Lucene's own and may be longer than the vector.
_BYTE_SCRIPT = (
    "byte[] s = (byte[]) doc[params.f].value; byte[] r = new byte[params.n]; "
    "for (int i = 0; i < params.n; ++i) { r[i] = s[i]; } return r;"
)


@dataclass(frozen=True)
class VectorField:
    """The field to read. `nested` is the path of its closest parent of type `nested`, None where there is none."""

    name: str
    dimension: int
    data_type: str
    nested: str | None = None

    @property
    def columns(self) -> int:
        return columns(self.dimension, self.data_type)

    @property
    def dtype(self) -> np.dtype:
        return cast(np.dtype, NUMPY_TYPES[self.data_type])

    def exists(self) -> dict[str, Any]:
        """The query for documents that have a vector."""
        exists = {"exists": {"field": self.name}}
        return {"nested": {"path": self.nested, "query": exists}} if self.nested else exists


@dataclass(frozen=True)
class Reader:
    """One way to get vectors out of hits.

    Attributes:
      accept: media type to ask for.
      request: the parts of the search body that ask for the vector.
      decode: page bytes to Page.
      hit_bytes: size of a hit in the response, estimated.
    """

    name: str
    accept: str
    request: dict[str, Any]
    decode: Callable[[bytes], Page]
    hit_bytes: float


def make_reader(name: str, field: VectorField) -> Reader:
    """The reader called `name`, one of READERS, for `field`."""
    vector_bytes = field.columns * field.dtype.itemsize
    if name == "source":

        def from_json(data: bytes) -> Page:
            return decode_json(data, field.name, field.columns, field.dtype, field.nested is not None)

        # A float32 takes 9 to 13 characters, depending on the client that wrote it.
        characters = {"float": 12, "byte": 4, "binary": 4}[field.data_type]
        return Reader(name, JSON, {"_source": [field.name]}, from_json, 90 + characters * field.columns)

    if name == "docvalues":
        key = field.name
        request: dict[str, Any] = {"docvalue_fields": [{"field": field.name}]}
    else:
        script = {
            "lang": "painless",
            "source": _FLOAT_SCRIPT if field.data_type == "float" else _BYTE_SCRIPT,
            "params": {"f": field.name, "n": field.columns},
        }
        key = _SCRIPT_FIELD
        request = {"script_fields": {_SCRIPT_FIELD: {"script": script}}}

    def from_cbor(data: bytes) -> Page:
        return decode_cbor(data, key, field.columns, field.dtype)

    # Stored fields, the document's id among them, would be decompressed for every hit.
    request = {"_source": False, "stored_fields": "_none_", **request}
    return Reader(name, CBOR, request, from_cbor, 60 + len(key) + vector_bytes)


@dataclass(frozen=True)
class Draw:
    """The random numbers of a read: `seed` decides them, `keep` is the fraction of documents wanted."""

    seed: int
    keep: float = 1.0

    @property
    def limit(self) -> int:
        """Priorities below this are wanted; 2**64 for all."""
        return min(1 << 64, max(0, int(self.keep * 2.0**64)))

    def query(self, filters: list[Any], thin: bool) -> dict[str, Any]:
        """A query whose hits have their draw as the score; with `thin`, only those whose priority can be below
        `limit`.
        """
        function: dict[str, Any] = {
            "query": {"bool": {"filter": filters}},
            # The server folds longer seeds into 32 bits.
            "random_score": {"seed": stream_key(self.seed, "random_score") & 0x7FFFFFFF, "field": "_seq_no"},
            "boost_mode": "replace",
        }
        # Exact: a multiple of 2**-24 below 1 is a float32. The low 40 bits of the priority are cut off on the client.
        lowest = DRAWS - 1 - (self.limit >> 40)
        if thin and lowest > 0:
            function["min_score"] = lowest / DRAWS
        return {"function_score": function}

    def priorities(self, page: Page, index: str, shard: int, nested: bool) -> np.ndarray:
        """(n,) uint64: the draw, then 40 bits of our own, so that equal draws are ordered at random too."""
        if nested:
            return priority(stream_key(self.seed, index, str(shard), "nested"), page.rows)
        low = priority(stream_key(self.seed, index, str(shard)), page.rows) >> np.uint64(24)
        return ((np.uint64(DRAWS - 1) - page.draws) << np.uint64(40)) | low

    def wanted(self, priorities: np.ndarray) -> np.ndarray | slice:
        """Which of `priorities` are below `limit`."""
        return slice(None) if self.limit >= 1 << 64 else priorities < np.uint64(self.limit)


def page_body(query: dict[str, Any], reader: Reader, rows: int) -> dict[str, Any]:
    """Body of a search for `rows` hits in the order of `_seq_no`, with their draws."""
    return {
        "size": rows,
        "query": query,
        "sort": [{"_seq_no": "asc"}],
        "track_scores": True,
        "track_total_hits": False,
        **reader.request,
    }


def as_filters(*queries: str) -> list[Any]:
    """JSON queries as filters; empty ones are left out."""
    return [json.loads(query) for query in queries if query]
