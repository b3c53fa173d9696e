# SPDX-License-Identifier: Apache-2.0
"""From an index expression to slices: which indices and shards, is the field right, how many vectors, which reader
works.

Needs of the user's role, for the indices: `read` (an OpenSearch action group) and, to honour filtered aliases and spare
a request, `indices:admin/shards/search_shards`; `indices:data/read/point_in_time/*` for a stable view while reading.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any
from urllib.parse import quote

import numpy as np

from transforms.errors import RequestError, TrainingError
from transforms.opensearch.decoding import Page
from transforms.opensearch.pages import READERS, Draw, Reader, VectorField, as_filters, make_reader, page_body
from transforms.opensearch.session import ServerError, Session, check_shards

#: A slice is what is read again after a worker is lost.
VECTORS_PER_SLICE = 1_000_000
_SMALLEST_SLICE = 10_000
_LEAST_SLICES = 4

_PROBED_ROWS = 16
_PROBED_WINDOW = 10_000


@dataclass(frozen=True)
class Slice:
    """Part of one shard: the documents whose `_seq_no` is from `first` to `last`.

    Attributes:
      count: documents expected, to choose the first window.
      field: what to read.
      reader: name of the reader that was found to work.
      alias_filter: JSON query of the filtered alias by which the index was named, or empty.
      documents_without_vector: counted on planning, in the first slice for the whole source, else 0.
      objects: vectors in a document on average; more than 1 only where the field is nested.
      nodes: ids of the nodes that hold a copy of the shard; empty where that may not be known.
      begin, step: `begin` + n * `step` is the share of the source that comes before `_seq_no` n. Indices follow one
        another by name, the shards of one are side by side.
    """

    index: str
    shard: int
    first: int
    last: int
    count: int
    field: VectorField
    reader: str
    alias_filter: str = ""
    documents_without_vector: int = 0
    objects: float = 1.0
    nodes: tuple[str, ...] = ()
    begin: float = 0.0
    step: float = 0.0

    def positions(self, seq_nos: np.ndarray) -> np.ndarray:
        """(n,) float32 positions of (n,) `_seq_no`s in the source; see `VectorBlock`."""
        return (self.begin + self.step * seq_nos).astype(np.float32)


@dataclass(frozen=True)
class _Shard:
    index: str
    number: int
    nodes: tuple[str, ...]
    alias_filter: str
    field: VectorField
    documents: int
    vectors: int
    without: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """What was found: the number of vectors, of documents without one, the slices, the reader by name."""

    vectors: int
    without: int
    slices: tuple[Slice, ...]
    reader: str
    hit_bytes: float


def make_plan(
    session: Session, expression: str, field: str, dimension: int, data_type: str, query: str, reader: str, slices: int
) -> Plan:
    """Plans the read of `field` in the indices that `expression` names.

    Args:
      session: open.
      expression: index, alias, data stream, wildcard, or several with commas.
      field: dotted path.
      dimension: expected.
      data_type: expected; float, byte or binary.
      query: JSON query that documents must match, or empty.
      reader: one of READERS or `auto`.
      slices: at least this many in all where there are as many documents; 0 to choose.

    Raises:
      RequestError: the index or the field is not what the arguments say, or the cluster refuses.
      TrainingError: the cluster fails.
    """
    try:
        fields = _fields(session, expression, field, dimension, data_type)
        shards = []
        for index, (copies, alias_filter) in _shards(session, expression, list(fields)).items():
            shards += [
                _count(session, index, number, nodes, fields[index], query, alias_filter)
                for number, nodes in copies.items()
            ]
        held = [shard for shard in shards if shard.documents]
        probed: dict[str, Reader] = {}
        for shard in held:
            if shard.index not in probed:
                probed[shard.index] = _choose_reader(session, shard, reader, query)
    except ServerError as error:
        raise session.explain(error) from None
    without = sum(shard.without for shard in shards)
    return Plan(
        vectors=sum(shard.vectors for shard in shards),
        without=without,
        slices=tuple(_split(held, probed, without, slices)),
        reader=", ".join(sorted({used.name for used in probed.values()})) or reader,
        hit_bytes=max((used.hit_bytes for used in probed.values()), default=0.0),
    )


def path_of(expression: str) -> str:
    """`expression` as a URL path segment."""
    return quote(expression, safe=",*")


def _fields(session: Session, expression: str, name: str, dimension: int, data_type: str) -> dict[str, VectorField]:
    """The field in each concrete index, checked as the plugin's `IndexUtil.validateKnnField` does, in its words."""
    if not expression.strip():
        raise RequestError('Request did not set "training_index.')
    if not name:
        raise RequestError("Field path is empty.")
    try:
        found = session.named(session.json("GET", f"/{path_of(expression)}/_mapping/field/{quote(name, safe='')}"))
    except ServerError as error:
        if error.status == 404:
            raise RequestError(f'Index "{expression}" does not exist.') from None
        raise
    if not found:
        raise RequestError(f'Index "{expression}" does not exist.')
    parents = _nested_parents(session, expression, name)
    fields = {}
    for index in sorted(found):
        where = "" if index == expression else f' (index "{index}")'
        mapping = found[index].get("mappings", {}).get(name, {}).get("mapping", {})
        if not mapping:
            raise RequestError(f'Field "{name}" does not exist.{where}')
        (settings,) = mapping.values()
        problem = _field_problem(session, name, settings, dimension, data_type)
        if problem:
            raise RequestError(problem + where)
        fields[index] = VectorField(name, dimension, data_type, parents.get(index))
    return fields


def _field_problem(session: Session, name: str, settings: dict[str, Any], dimension: int, data_type: str) -> str | None:
    if settings.get("type") != "knn_vector":
        return f'Field "{name}" is not of type knn_vector.'
    found_type = str(settings.get("data_type", "float")).lower()
    found = settings.get("dimension")
    model = settings.get("model_id")
    if found is None and model is not None:
        try:
            described = session.json(
                "GET", f"/_plugins/_knn/models/{quote(model, safe='')}", {"filter_path": "state,dimension,data_type"}
            )
        except ServerError as error:
            if error.status != 404:
                raise
            described = {}
        if described.get("state") != "created":
            return f'Model "{model}" for field "{name}" is not created.'
        found, found_type = described["dimension"], str(described.get("data_type", "float")).lower()
    if found_type != data_type:
        return (
            f'Field "{name}" has data type {found_type}, which is different from data type used in the '
            f"training request: {data_type}"
        )
    if found is None:
        return f'Field "{name}" does not have a dimension set.'
    if found != dimension:
        return (
            f'Field "{name}" has dimension {found}, which is different from dimension specified in the '
            f"training request: {dimension}"
        )
    return None


def _nested_parents(session: Session, expression: str, name: str) -> dict[str, str]:
    """The closest parent of type `nested` in each index that has one."""
    parts = name.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts))]
    if not paths:
        return {}
    # The parents are only reported beside the field itself.
    found = session.json("GET", f"/{path_of(expression)}/_field_caps", {"fields": ",".join([*paths, name])})
    parents = {}
    for path in paths:  # the longest comes last
        nested = found["fields"].get(path, {}).get("nested")
        if nested:
            parents.update(dict.fromkeys(nested.get("indices") or found["indices"], path))
    return parents


def _shards(session: Session, expression: str, indices: list[str]) -> dict[str, tuple[dict[int, tuple[str, ...]], str]]:
    """Shard numbers with the ids of the nodes that hold them, and alias filter (JSON, or empty), of each concrete
    index.
    """
    try:
        found = session.json("GET", f"/{path_of(expression)}/_search_shards")
    except ServerError as error:
        if error.status != 403 or any(index not in expression.split(",") for index in indices):
            raise
        # Without that permission an alias could hide a filter, but these are names of indices.
        return {index: (dict.fromkeys(range(_shard_count(session, index)), ()), "") for index in indices}
    held: dict[str, dict[int, set[str]]] = {}
    for copies in found["shards"]:
        for copy in copies:
            held.setdefault(copy["index"], {}).setdefault(copy["shard"], set()).add(copy["node"])
    missing = [index for index in indices if index not in held]
    if missing:
        raise TrainingError(f'Index "{missing[0]}" has no shard that can be searched')
    if not all(found["shards"]):  # a shard without a copy is an empty list, which does not say whose it is
        for index in indices:
            lost = sorted(set(range(_shard_count(session, index))) - set(held[index]))
            if lost:
                shards = f"shard{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
                raise TrainingError(f'Index "{index}" has no active copy of {shards}: vectors would be missing')
    result = {}
    for index in indices:
        alias_filter = found["indices"].get(index, {}).get("filter")
        nodes = {number: tuple(sorted(held[index][number])) for number in sorted(held[index])}
        result[index] = (nodes, json.dumps(alias_filter) if alias_filter else "")
    return result


def _shard_count(session: Session, index: str) -> int:
    body = {"size": 0, "track_total_hits": False}
    return int(session.json("POST", f"/{path_of(index)}/_search", body=body)["_shards"]["total"])


def _count(
    session: Session,
    index: str,
    number: int,
    nodes: tuple[str, ...],
    field: VectorField,
    query: str,
    alias_filter: str,
) -> _Shard:
    """How many vectors a shard has and the range of their `_seq_no`, by one search that returns no hits."""
    aggregations: dict[str, Any] = {"first": {"min": {"field": "_seq_no"}}, "last": {"max": {"field": "_seq_no"}}}
    if field.nested:
        objects = {"with": {"filter": {"exists": {"field": field.name}}}}
        aggregations["objects"] = {"nested": {"path": field.nested}, "aggs": objects}
    body = {
        "size": 0,
        "track_total_hits": True,
        "query": {"bool": {"filter": as_filters(query, alias_filter)}},
        "aggs": {"found": {"filter": field.exists(), "aggs": aggregations}},
    }
    path = f"/{path_of(index)}/_search"
    params = {"preference": f"_shards:{number}", "allow_partial_search_results": "false"}
    answer = session.send("POST", path, params, body, check=_complete)
    found = answer["aggregations"]["found"]
    documents = found["doc_count"]
    vectors = found["objects"]["with"]["doc_count"] if field.nested else documents
    first, last = (int(found[name]["value"]) for name in ("first", "last")) if documents else (0, -1)
    without = answer["hits"]["total"]["value"] - documents
    return _Shard(index, number, nodes, alias_filter, field, documents, vectors, without, first, last)


def _complete(data: bytes) -> Any:
    answer = json.loads(data)
    check_shards(answer)
    return answer


def _split(shards: Sequence[_Shard], readers: dict[str, Reader], without: int, slices: int) -> list[Slice]:
    """Cuts the shards into slices of about equal numbers of documents."""
    total = sum(shard.documents for shard in shards)
    wanted = slices or max(_LEAST_SLICES, math.ceil(total / VECTORS_PER_SLICE))
    # The shard with the largest slices is cut once more until there are enough. Small slices cost more than they gain.
    parts = [1] * len(shards)
    heap: list[tuple[float, int]] = [(-shard.documents, at) for at, shard in enumerate(shards)]
    heapq.heapify(heap)
    missing = wanted - len(shards)
    while missing > 0 and heap:
        _, at = heapq.heappop(heap)
        documents, span = shards[at].documents, shards[at].last - shards[at].first + 1
        most = documents if slices else math.ceil(documents / _SMALLEST_SLICE)
        if parts[at] < min(most, span):
            parts[at] += 1
            missing -= 1
            heapq.heappush(heap, (-documents / parts[at], at))
    held: dict[str, int] = {}
    for shard in shards:
        held[shard.index] = held.get(shard.index, 0) + shard.documents
    before = dict(zip(held, accumulate(held.values(), initial=0), strict=False))
    result: list[Slice] = []
    for shard, count in zip(shards, parts, strict=True):
        span = shard.last - shard.first + 1
        edges = [shard.first + span * part // count for part in range(count + 1)]
        reader = readers[shard.index].name
        documents = math.ceil(shard.documents / count)
        step = held[shard.index] / total / span
        begin = before[shard.index] / total - step * shard.first
        for first, end in pairwise(edges):
            counted = without if not result else 0
            result.append(
                Slice(
                    shard.index,
                    shard.number,
                    first,
                    end - 1,
                    documents,
                    shard.field,
                    reader,
                    shard.alias_filter,
                    counted,
                    shard.vectors / shard.documents,
                    shard.nodes,
                    begin,
                    step,
                )
            )
    return result


def _choose_reader(session: Session, shard: _Shard, wanted: str, query: str) -> Reader:
    """The first reader that works on some documents and agrees with `_source`, bit by bit.

    Args:
      wanted: `auto` to try READERS in their order, or the one to use.

    Raises:
      RequestError: the wanted reader does not work here, with the cluster's reason.
    """
    field = shard.field
    # Objects inside a document only show in _source.
    names = ("source",) if field.nested else READERS if wanted == "auto" else (wanted,)
    if field.nested and wanted not in ("auto", "source"):
        raise RequestError(f'reader "{wanted}" cannot read the nested field "{field.name}": use source')
    truth: Page | None = None
    reasons = []
    for name in names:
        reader = make_reader(name, field)
        try:
            page = _probe(session, shard, reader, query)
        except (ServerError, TrainingError) as error:
            reasons.append(f"{name}: {error.reason if isinstance(error, ServerError) else error}")
            continue
        if name != "source":
            if truth is None:
                # Refused where `_source` is switched off.
                with suppress(ServerError):
                    truth = _probe(session, shard, make_reader("source", field), query)
            if not _agree(page, truth):
                reasons.append(f"{name}: the vectors differ from those in _source")
                continue
        elif not len(page.rows):
            reasons.append(f"source: {page.bad[0][1] if page.bad else 'no vectors'}")
            continue
        return reader
    raise RequestError(f'cannot read the vectors of "{field.name}" in index "{shard.index}": ' + "; ".join(reasons))


def _probe(session: Session, shard: _Shard, reader: Reader, query: str) -> Page:
    # The window holds at least the document `first`, and ranking all documents of a large shard would take long.
    window = {"range": {"_seq_no": {"gte": shard.first, "lt": shard.first + _PROBED_WINDOW}}}
    filters = [shard.field.exists(), *as_filters(query, shard.alias_filter), window]
    body = page_body(Draw(0).query(filters, thin=False), reader, _PROBED_ROWS)
    path, params = f"/{path_of(shard.index)}/_search", {"preference": f"_shards:{shard.number}"}
    # Two tries: a refusal may look like a fault, and the next reader is the better answer to both.
    page: Page = session.send("POST", path, params, body, accept=reader.accept, check=reader.decode, attempts=2)
    return page


def _agree(page: Page, truth: Page | None) -> bool:
    """Whether two readers gave the same. Where `_source` is switched off or keeps no vector there is nothing to
    compare.
    """
    if truth is None or not len(truth.rows):
        return len(page.rows) > 0
    common, ours, theirs = np.intersect1d(page.rows, truth.rows, return_indices=True)
    return len(common) == len(truth.rows) == len(page.rows) and bool(
        (page.vectors[ours].view(np.uint8) == truth.vectors[theirs].view(np.uint8)).all()
        and (page.draws[ours] == truth.draws[theirs]).all()
    )
