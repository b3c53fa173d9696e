# SPDX-License-Identifier: Apache-2.0
"""What comes out of real servers is what went in, by every reader, in any slicing, thinned or whole."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from tests.opensearch.support import (
    Proxy,
    assert_no_contexts,
    create,
    fill,
    knn_vector,
    put,
    read,
    refuse,
    same_rows,
    source,
    vectors,
)
from transforms.errors import RequestError
from transforms.opensearch import OpenSearchConnection, OpenSearchVectors
from transforms.opensearch.planning import make_plan
from transforms.opensearch.session import Session

MATRIX = vectors(3000, 8)


@pytest.fixture(scope="module")
def many(opensearch):
    """3 000 vectors in 3 shards, some rewritten and some deleted, so that `_seq_no` has gaps."""
    fill(opensearch, "many", MATRIX, shards=3)
    client = opensearch.client()
    put(opensearch, "many", [{"vec": [float(n)] * 8, "doomed": True} for n in range(500)])
    client.delete_by_query(index="many", body={"query": {"term": {"doomed": True}}}, refresh=True)
    put(opensearch, "many", [{"other": n} for n in range(70)] + [{"vec": None}] * 7)
    return opensearch


@pytest.mark.parametrize("reader", ["auto", "script", "source"])
def test_a_full_read_is_what_was_indexed(many, reader):
    source_ = source(many, "many", 8, reader=reader)
    _, found = read(source_)
    assert same_rows(found, MATRIX)
    assert source_.summary().count == 3000
    assert source_.summary().documents == 3077
    assert source_.documents_without_vector == 77
    assert sum(part.documents_without_vector for part in source_.slices()) == 77
    assert source_.summary().reader == ("script" if reader == "auto" else reader)
    assert_no_contexts(many)


def test_docvalues_are_refused_before_3_7_with_the_clusters_reason(many):
    with pytest.raises(RequestError, match=r"cannot read the vectors .* docvalues: .*"):
        read(source(many, "many", 8, reader="docvalues"))


def test_docvalues_of_3_7_seen_through_a_proxy(many):
    """No 3.7 server can be had here. The proxy answers a `docvalue_fields` request as 3.7 does, with little-endian
    bytes under the field's name, by asking this server for a script field of that name.
    """
    script = (
        "float[] s = (float[]) doc['vec'].value; byte[] r = new byte[4 * s.length]; int j = 0; "
        "for (float f : s) { int b = Float.floatToRawIntBits(f); "
        "for (int k = 0; k < 32; k += 8) { r[j++] = (byte) (b >> k); } } return r;"
    )

    def translated(body):
        asked = json.loads(body)
        if asked.pop("docvalue_fields", None) is None:
            return body
        return json.dumps({**asked, "script_fields": {"vec": {"script": script}}}).encode()

    with Proxy(many.url) as proxy:
        forward = proxy._forward

        def rewriting(handler, body):
            body = translated(body) if b"docvalue_fields" in body else body
            handler.headers.replace_header("content-length", str(len(body))) if body else None
            return forward(handler, body)

        proxy._forward = rewriting
        source_ = source(many, "many", 8, url=proxy.url)
        assert source_.summary().reader == "docvalues"
        priorities, found = read(source_)
    direct, same = read(source(many, "many", 8, reader="source"))
    assert (priorities == direct).all()
    assert (found == same).all()


def test_slices_page_sizes_and_readers_do_not_change_vectors_or_priorities(many):
    priorities, found = read(source(many, "many", 8, seed=5))
    assert len(np.unique(priorities)) == 3000
    for options in ({"slices_wanted": 7}, {"slices_wanted": 1}, {"slices_wanted": 40, "reader": "source"}):
        other, same = read(source(many, "many", 8, seed=5, search_size=13, **options))
        assert (other == priorities).all()
        assert (same == found).all()
    assert len(source(many, "many", 8, slices_wanted=7).slices()) == 7
    assert (read(source(many, "many", 8, seed=6))[0] != priorities).all()
    assert_no_contexts(many)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1, 1 / 3, 0.003, 0.0])
@pytest.mark.parametrize("reader", ["script", "source"])
def test_a_thinned_read_is_the_smallest_priorities_of_the_full_read(many, keep, reader):
    priorities, found = read(source(many, "many", 8, seed=5))
    fewer, rows = read(source(many, "many", 8, seed=5, search_size=100, slices_wanted=5, reader=reader), keep)
    wanted = priorities < np.uint64(int(keep * 2**64))
    assert (fewer == priorities[wanted]).all()
    assert len(fewer) == 0 or (rows == found[wanted]).all()


def test_the_cluster_thins_so_that_little_is_sent(many):
    with Proxy(many.url) as proxy:
        source_ = source(many, "many", 8, seed=5, url=proxy.url)
        parts = source_.slices()
        received = {}
        for keep in (1.0, 0.1):
            before = len(proxy.seen)
            rows = sum(len(block) for part in parts for block in source_.read(part, keep, print))
            received[keep] = rows
            pages = [body for _, path, body in proxy.seen[before:] if path.startswith("/_search?")]
            # One window a shard is enough at either rate: windows widen as the rate falls.
            assert len(pages) <= 2 * len(parts)
            assert all(("min_score" in json.loads(body)["query"]["function_score"]) == (keep < 1) for body in pages)
    assert received[1.0] == 3000
    assert 200 < received[0.1] < 400


def test_priorities_are_the_same_on_both_versions(opensearch_2, opensearch_3):
    """And so depend on nothing but seed, index name, shard and `_seq_no`: not on index ids, nodes or segments."""
    found = []
    for server, batch in ((opensearch_2, 2000), (opensearch_3, 37)):
        create(server, "twin", {"vec": knn_vector(8)}, shards=1)
        put(server, "twin", [{"vec": row.tolist()} for row in MATRIX[:500]], batch=batch)
        found.append(read(source(server, "twin", 8, seed=11)))
    assert (found[0][0] == found[1][0]).all()
    assert (found[0][1] == found[1][1]).all()
    # The same documents in an index built anew have the same priorities, in one of another name others.
    create(opensearch_3, "twin", {"vec": knn_vector(8)})
    put(opensearch_3, "twin", [{"vec": row.tolist()} for row in MATRIX[:500]])
    assert (read(source(opensearch_3, "twin", 8, seed=11))[0] == found[0][0]).all()
    fill(opensearch_3, "twin-2", MATRIX[:500])
    assert not np.isin(read(source(opensearch_3, "twin-2", 8, seed=11))[0], found[0][0]).any()


def test_priorities_are_uniform_over_positions_and_shards(opensearch_3):
    """Chi-square of who is among the 20 % smallest, by place in the index and by shard, and of the priorities."""
    count, bins = 20_000, 20
    matrix = np.zeros((count, 2), np.float32)
    matrix[:, 0] = np.arange(count)
    fill(opensearch_3, "uniform", matrix, shards=4)
    # 99.9 % quantiles of chi-square with 19 and 3 degrees of freedom.
    limit, shard_limit = 43.8, 16.3
    source_ = source(opensearch_3, "uniform", 2, seed=2)
    priorities, found = read(source_)
    chosen = found[: count // 5, 0]
    expected = len(chosen) / bins
    positions = np.histogram(chosen, bins, (0, count))[0]
    assert ((positions - expected) ** 2 / expected).sum() < limit
    values = np.histogram(priorities.astype(np.float64), bins, (0, 2.0**64))[0]
    assert ((values - count / bins) ** 2 / (count / bins)).sum() < limit
    last_bits = np.bincount((priorities % np.uint64(bins)).astype(int), minlength=bins)
    assert ((last_bits - count / bins) ** 2 / (count / bins)).sum() < limit
    keep = 0.2
    shards: dict[int, list[int]] = {}
    for part in source_.slices():
        rows = sum(len(block) for block in source_.read(part, keep, print))
        kept, of = shards.get(part.shard, [0, 0])
        shards[part.shard] = [kept + rows, of + part.count]
    assert len(shards) == 4
    assert sum((kept - keep * of) ** 2 / (keep * of * (1 - keep)) for kept, of in shards.values()) < shard_limit


def test_dotted_fields_in_every_spelling(opensearch):
    create(opensearch, "dotted", {"a": {"properties": {"b": {"properties": {"vec": knn_vector(8)}}}}}, shards=2)
    rows = [row.tolist() for row in MATRIX[:4]]
    put(opensearch, "dotted", [{"a": {"b": {"vec": rows[0]}}}, {"a.b.vec": rows[1]}, {"a.b": {"vec": rows[2]}}])
    put(opensearch, "dotted", [{"a": [{"b": {"vec": rows[3]}}]}, {"a": {"b": {}}}])
    for reader in ("script", "source"):
        source_ = source(opensearch, "dotted", 8, "a.b.vec", reader=reader)
        assert same_rows(read(source_)[1], MATRIX[:4])
        assert source_.documents_without_vector == 1


def test_nested_objects_are_vectors(opensearch):
    mapping = {"parts": {"type": "nested", "properties": {"vec": knn_vector(8)}}}
    create(opensearch, "nested", mapping, shards=2)
    rows = MATRIX[:90].tolist()
    documents = [{"parts": [{"vec": row} for row in rows[at : at + 3]] + [{"x": 1}]} for at in range(0, 90, 3)]
    put(opensearch, "nested", [*documents, {"parts": []}, {"y": 2}])
    source_ = source(opensearch, "nested", 8, "parts.vec", seed=4)
    assert source_.summary().count == 90
    assert source_.summary().reader == "source"
    assert source_.documents_without_vector == 2
    priorities, found = read(source_)
    assert same_rows(found, MATRIX[:90])
    assert len(np.unique(priorities)) == 90
    other, _ = read(source(opensearch, "nested", 8, "parts.vec", seed=4, search_size=4, slices_wanted=5))
    assert (other == priorities).all()
    half, _ = read(source_, 0.5)
    assert (half == priorities[priorities < np.uint64(2**63)]).all()
    assert 20 < len(half) < 70
    with pytest.raises(RequestError, match="cannot read the nested field"):
        read(source(opensearch, "nested", 8, "parts.vec", reader="script"))


@pytest.mark.parametrize("reader", ["auto", "script", "source"])
def test_byte_and_binary_vectors(opensearch, reader):
    whole = np.random.default_rng(3).integers(-128, 128, (300, 8)).astype(np.int8)
    fill(opensearch, "bytes", whole, data_type="byte")
    _, found = read(source(opensearch, "bytes", 8, data_type="byte", reader=reader))
    assert found.dtype == np.int8
    assert same_rows(found, whole)
    create(opensearch, "bits", {"vec": knn_vector(64, data_type="binary", space_type="hamming")})
    put(opensearch, "bits", [{"vec": row.tolist()} for row in whole])
    _, found = read(source(opensearch, "bits", 64, data_type="binary", reader=reader))
    assert found.dtype == np.uint8
    assert same_rows(found, whole.view(np.uint8))


def test_vectors_that_lucene_returns_in_a_shared_buffer(opensearch):
    """With index.knn the plugin's getter gives every hit of a segment the same array; the script must copy."""
    method = {"name": "hnsw", "engine": "lucene", "space_type": "l2"}
    for index, data_type in (("shared", "float"), ("shared-bytes", "byte")):
        mapping = {"vec": knn_vector(8, method=method, data_type=data_type)}
        create(opensearch, index, mapping, settings={"index.knn": True})
        matrix = MATRIX[:200] if data_type == "float" else (MATRIX[:200] * 20).astype(np.int8)
        put(opensearch, index, [{"vec": row.tolist()} for row in matrix])
        source_ = source(opensearch, index, 8, data_type=data_type)
        assert source_.summary().reader == "script"
        assert same_rows(read(source_)[1], matrix)
    script = {"v": {"script": "doc['vec'].value"}}
    hits = opensearch.client().search(index="shared", body={"size": 50, "script_fields": script})["hits"]["hits"]
    assert len({str(hit["fields"]["v"]) for hit in hits}) == 1, "the trap is gone: the comment in pages.py can go too"


def test_a_script_that_tells_lies_is_not_believed(many, monkeypatch):
    lie = "byte[] r = new byte[32]; return r;"
    monkeypatch.setattr("transforms.opensearch.pages._FLOAT_SCRIPT", lie)
    source_ = source(many, "many", 8)
    assert source_.summary().reader == "source"
    assert same_rows(read(source_)[1], MATRIX)
    with pytest.raises(RequestError, match="script: the vectors differ from those in _source"):
        source(many, "many", 8, reader="script").slices()


def test_where_source_is_switched_off_the_script_reads_alone(opensearch):
    client = opensearch.client()
    client.indices.delete(index="sourceless", ignore=[404])
    mappings = {"_source": {"enabled": False}, "properties": {"vec": knn_vector(8)}}
    client.indices.create(index="sourceless", body={"mappings": mappings, "settings": {"number_of_replicas": 0}})
    put(opensearch, "sourceless", [{"vec": row.tolist()} for row in MATRIX[:50]])
    source_ = source(opensearch, "sourceless", 8)
    assert source_.summary().reader == "script"
    assert same_rows(read(source_)[1], MATRIX[:50])
    with pytest.raises(RequestError, match=r"source: .*_source is disabled in the mappings"):
        source(opensearch, "sourceless", 8, reader="source").slices()


def test_several_indices_aliases_wildcards_and_data_streams(opensearch):
    client = opensearch.client()
    client.indices.delete(index="part-*")
    for number in range(3):
        create(opensearch, f"part-{number}", {"vec": knn_vector(8), "n": {"type": "integer"}}, shards=2)
        rows = [{"vec": MATRIX[n].tolist(), "n": n} for n in range(100 * number, 100 * number + 100)]
        put(opensearch, f"part-{number}", rows)
    actions = [{"add": {"index": f"part-{number}", "alias": "both"}} for number in (0, 2)]
    few = {"add": {"index": "part-1", "alias": "few", "filter": {"range": {"n": {"lt": 130}}}}}
    client.indices.update_aliases(body={"actions": [*actions, few]})
    both = np.concatenate([MATRIX[:100], MATRIX[200:300]])
    assert same_rows(read(source(opensearch, "both", 8))[1], both)
    assert same_rows(read(source(opensearch, "part-*", 8))[1], MATRIX[:300])
    assert same_rows(read(source(opensearch, "part-2,part-0", 8))[1], both)
    # An alias with a filter shows part of its index.
    assert same_rows(read(source(opensearch, "few", 8, reader="source"))[1], MATRIX[100:130])
    assert same_rows(read(source(opensearch, "few,both", 8))[1], np.concatenate([both, MATRIX[100:130]]))
    with pytest.raises(RequestError, match=r'Index "nothing" does not exist\.'):
        source(opensearch, "nothing", 8).slices()
    with pytest.raises(RequestError, match=r'Index "nothing-\*" does not exist\.'):
        source(opensearch, "nothing-*", 8).slices()


def test_data_streams(opensearch):
    client = opensearch.client()
    client.indices.delete_data_stream(name="stream", ignore=[404])
    template = {"mappings": {"properties": {"vec": knn_vector(8)}}, "settings": {"number_of_replicas": 0}}
    body = {"index_patterns": ["stream"], "data_stream": {}, "template": template}
    client.indices.put_index_template(name="stream", body=body)
    rows = [{"@timestamp": 1700000000000 + n, "vec": row.tolist()} for n, row in enumerate(MATRIX[:60])]
    put(opensearch, "stream", rows[:30], action="create")
    client.indices.rollover(alias="stream")
    put(opensearch, "stream", rows[30:], action="create")
    source_ = source(opensearch, "stream", 8)
    assert len({part.index for part in source_.slices()}) == 2
    assert same_rows(read(source_)[1], MATRIX[:60])


def test_a_query_limits_what_is_read(opensearch):
    create(opensearch, "tagged", {"vec": knn_vector(8), "lang": {"type": "keyword"}}, shards=2)
    documents = [{"vec": row.tolist(), "lang": "en" if n % 3 else "fr"} for n, row in enumerate(MATRIX[:600])]
    put(opensearch, "tagged", [*documents, {"lang": "fr"}, {"lang": "en"}])
    source_ = source(opensearch, "tagged", 8, query={"term": {"lang": "fr"}}, search_size=20)
    assert source_.summary().count == 200
    assert source_.documents_without_vector == 1
    priorities, found = read(source_)
    assert same_rows(found, MATRIX[:600:3])
    # A document's priority is its own: it does not depend on what else is asked for.
    assert np.isin(priorities, read(source(opensearch, "tagged", 8))[0]).all()
    with pytest.raises(RequestError, match=r"answers 400: .*\[nonsense\]"):
        source(opensearch, "tagged", 8, query={"nonsense": {}}).slices()


def test_an_empty_index_has_no_slices(opensearch):
    create(opensearch, "empty", {"vec": knn_vector(8)}, shards=2)
    put(opensearch, "empty", [{"x": 1}])
    source_ = source(opensearch, "empty", 8)
    assert source_.slices() == ()
    assert source_.summary().count == 0
    assert source_.documents_without_vector == 1


def test_fields_that_do_not_fit_are_named_in_the_plugins_words(opensearch):
    mapping = {"vec": knn_vector(8), "list": {"type": "float"}, "b": knn_vector(8, data_type="byte")}
    create(opensearch, "fields", mapping)
    put(opensearch, "fields", [{"vec": MATRIX[0].tolist(), "list": [1, 2]}])
    create(opensearch, "bare", None)

    def problem(field, dimension=8, index="fields", **options):
        with pytest.raises(RequestError) as found:
            source(opensearch, index, dimension, field, **options).slices()
        return str(found.value)

    assert problem("absent") == 'Field "absent" does not exist.'
    assert problem("vec", index="bare") == 'Field "vec" does not exist.'
    assert problem("vec", index="fields,bare") == 'Field "vec" does not exist. (index "bare")'
    assert problem("list") == 'Field "list" is not of type knn_vector.'
    assert problem("vec", 16) == (
        'Field "vec" has dimension 8, which is different from dimension specified in the training request: 16'
    )
    assert problem("b") == (
        'Field "b" has data type byte, which is different from data type used in the training request: float'
    )
    assert problem("") == "Field path is empty."


def test_a_field_backed_by_a_model_has_the_models_dimension(opensearch, tmp_path):
    """The mapping of such a field needs a model in the cluster, so a proxy writes it into the answer."""
    fill(opensearch, "modelled", MATRIX[:10])
    state = {"value": "created"}

    def rule(method, path, body):
        if "_mapping/field" in path:
            return lambda answer: answer.replace(b'"dimension":8', b'"model_id":"my model"')
        if path.startswith("/_plugins/_knn/models/my%20model"):
            return lambda answer: json.dumps({"state": state["value"], "dimension": 8}).encode()
        return None

    class Answering(Proxy):
        def _forward(self, handler, body):
            status, headers, data, kind = super()._forward(handler, body)
            return (200 if "_plugins" in handler.path else status), headers, data, kind

    with Answering(opensearch.url, rule) as proxy:
        assert same_rows(read(source(opensearch, "modelled", 8, url=proxy.url))[1], MATRIX[:10])
        with pytest.raises(RequestError, match=r'Field "vec" has dimension 8, which is different .*: 9$'):
            source(opensearch, "modelled", 9, url=proxy.url).slices()
        state["value"] = "training"
        with pytest.raises(RequestError, match=r'^Model "my model" for field "vec" is not created\.$'):
            source(opensearch, "modelled", 8, url=proxy.url).slices()


def test_documents_written_after_planning_are_not_read(opensearch):
    fill(opensearch, "growing", MATRIX[:100], shards=2)
    source_ = source(opensearch, "growing", 8)
    source_.slices()
    put(opensearch, "growing", [{"vec": row.tolist()} for row in MATRIX[100:200]])
    assert same_rows(read(source_)[1], MATRIX[:100])


def test_a_source_is_small_and_opens_nothing_until_asked(many):
    nowhere = OpenSearchVectors(OpenSearchConnection("http://127.0.0.1:9"), "many", "vec", 8)
    assert pickle.loads(pickle.dumps(nowhere)) == nowhere
    source_ = source(many, "many", 8)
    before = pickle.dumps(source_)
    source_.slices()
    assert pickle.dumps(source_) == before
    assert len(before) < 2000


def test_impossible_arguments_are_refused_at_once():
    for options in ({"search_size": 0}, {"search_size": 10_001}, {"reader": "x"}, {"data_type": "double"}):
        with pytest.raises(RequestError):
            OpenSearchVectors(OpenSearchConnection("http://localhost"), "i", "f", 8, **options)


def test_default_slices_grow_with_the_index(many):
    with Session(OpenSearchConnection(many.url)) as session:
        plan = make_plan(session, "many", "vec", 8, "float", "", "auto", 0)
    assert len(plan.slices) == 3
    assert {part.shard for part in plan.slices} == {0, 1, 2}


@pytest.mark.parametrize("slices", [0, 7])
def test_positions_follow_the_order_of_writing(opensearch, slices):
    """A quarter of the source in one index, the rest in three shards of the next, and some of it written later."""
    numbered = np.arange(2_000, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    fill(opensearch, "order-1", numbered[:500])
    fill(opensearch, "order-2", numbered[500:], shards=3)
    source_ = source(opensearch, "order-*", 4, slices_wanted=slices)
    for keep in (1.0, 0.5):
        blocks = [block for part in source_.slices() for block in source_.read(part, keep, refuse)]
        positions = np.concatenate([block.positions for block in blocks])
        written = np.concatenate([block.vectors for block in blocks])[:, 0] / 2_000
        assert positions.dtype == np.float32
        assert positions.min() >= 0
        assert positions.max() < 1
        # Documents fall to shards by chance, so each shard is its own measure of time: off by some 1 / sqrt(500).
        assert np.abs(positions - written).max() < 0.06
        assert np.array_equal(positions < 0.25, written < 0.25)


def test_positions_of_nested_objects_are_their_documents(opensearch):
    create(opensearch, "nested-order", {"parts": {"type": "nested", "properties": {"vec": knn_vector(2)}}})
    put(opensearch, "nested-order", [{"parts": [{"vec": [n, 0]}, {"vec": [n, 1]}]} for n in range(8)])
    source_ = source(opensearch, "nested-order", 2, field="parts.vec")
    (block,) = [block for part in source_.slices() for block in source_.read(part, 1.0, refuse)]
    assert dict(zip(map(tuple, block.vectors), block.positions, strict=True)) == {
        (n, at): n / 8 for n in range(8) for at in (0, 1)
    }
