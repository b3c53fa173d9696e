# SPDX-License-Identifier: Apache-2.0
"""One row for each rule of the Train Model API. `test_request_on_cluster` puts the same rows to real clusters."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import faiss
import numpy as np
import pytest

from transforms.errors import RequestError
from transforms.request import NEWEST_TARGET, VERSION_RULES, TrainingRequest

OLD, NEW = "2.19.1", NEWEST_TARGET
IVF = {"name": "ivf", "engine": "faiss"}
PLAIN = {"training_index": "train", "training_field": "vector", "dimension": 16, "method": IVF}
WITHOUT_METHOD = {name: value for name, value in PLAIN.items() if name != "method"}


def plain(**changes: Any) -> dict[str, Any]:
    return {**PLAIN, **changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in PLAIN.items() if key != name}


def ivf(encoder: object = None, /, *, body: dict[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    if encoder is not None:
        parameters["encoder"] = encoder
    return plain(method={**IVF, "parameters": parameters}, **(body or {}))


def hnsw(encoder: object = None, /, *, body: dict[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    if encoder is not None:
        parameters["encoder"] = encoder
    return plain(method={"name": "hnsw", "engine": "faiss", "parameters": parameters}, **(body or {}))


def encoder(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


def parse(body: object, version: str = NEW, **keywords: Any) -> TrainingRequest:
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    return TrainingRequest.parse(text, target_version=version, **keywords)


def failed(*messages: str) -> str:
    return "Validation Failed: " + "".join(f"{n}: {message};" for n, message in enumerate(messages, start=1))


NO_ENCODER = "parameter validation failed for MethodComponentContext parameter [encoder]."
PQ_M = "Training request ENCODER_PARAMETER_PQ_M is not divisible by vector dimensions"
CONFLICT = "Cannot specify an encoder that conflicts with the provided compression level"
BOTH = (OLD, NEW)


def bad_integer(name: str) -> str:
    return f"parameter validation failed for Integer parameter [{name}]."


def not_integer(name: str) -> str:
    return f"value is not an instance of Integer for Integer parameter [{name}]."


# (id, body, versions, message)
REFUSED: list[tuple[str, object, tuple[str, ...], str]] = [
    # fields of the body
    ("unknown field", plain(node_id="n"), BOTH, 'Unable to parse token. "node_id" is not a valid parameter.'),
    ("top-level engine before 3.3", plain(engine="faiss"), (OLD, "3.2.0"),
     'Unable to parse token. "engine" is not a valid parameter.'),
    ("top-level space_type before 2.18", plain(space_type="l2"), ("2.17.1",),
     'Unable to parse token. "space_type" is not a valid parameter.'),
    ("no index", without("training_index"), BOTH, 'Request did not set "training_index.'),
    ("null index", plain(training_index=None), BOTH, 'Request did not set "training_index.'),
    ("no field", without("training_field"), BOTH, 'Request did not set "training_field.'),
    ("no dimension", without("dimension"), BOTH, 'Request did not set "dimension.'),
    ("dimension -1 means not set", plain(dimension=-1), BOTH, 'Request did not set "dimension.'),
    ("dimension with decimals", plain(dimension=16.5), BOTH, "Value [16.5] has a decimal part"),
    ("dimension beyond 32 bits", plain(dimension=3000000000), BOTH,
     "Value [3000000000] is out of range for an integer"),
    ("dimension not a number", plain(dimension="x"), BOTH, 'For input string: "x"'),
    ("dimension is a boolean", plain(dimension=True), BOTH, 'For input string: "true"'),
    ("dimension empty", plain(dimension=""), BOTH, "empty String"),
    ("dimension too large", plain(dimension=16001), BOTH,
     failed("Dimension value cannot be greater than 16000 for vector with engine: faiss")),
    ("no method, mode or compression", WITHOUT_METHOD, BOTH,
     'At least "[method]", "[mode]" or "[compression_level]" needs to be set'),
    ("count 0", plain(max_training_vector_count=0), BOTH,
     "Maximum vector count 0 is invalid. Maximum vector count must be greater than 0"),
    ("count -2", plain(max_training_vector_count=-2), BOTH,
     "Maximum vector count -2 is invalid. Maximum vector count must be greater than 0"),
    ("search size 0", plain(search_size=0), BOTH,
     "Search size 0 is invalid. Search size must be between 0 and 10,000"),
    ("search size too large", plain(search_size=10001), BOTH,
     "Search size 10001 is invalid. Search size must be between 0 and 10,000"),
    ("comma in description", plain(description="a,b"), BOTH, "Model description cannot contain any commas: ','"),
    ("description too long", plain(description="d" * 1001), BOTH,
     failed("Description exceeds limit of 1000 characters")),
    ("description counted in utf-16 units", plain(description="\U0001f600" * 501), BOTH,
     failed("Description exceeds limit of 1000 characters")),
    ("unknown data type", plain(data_type="half"), BOTH,
     "Invalid value provided for [data_type] field. Supported values are [binary,byte,float]"),
    ("unknown mode", plain(mode="on_tape"), BOTH, 'Invalid mode: "[on_tape]"'),
    ("unknown compression level", plain(compression_level="3x"), BOTH, 'Invalid compression level: "[3x]"'),
    ("compression level in another case", plain(compression_level="2X"), BOTH, 'Invalid compression level: "[2X]"'),
    ("mode with bytes", plain(mode="on_disk", data_type="byte"), BOTH,
     'When "[mode]" or "[compression_level]" is set, "[data_type]" must be set to "[float]"'),
    ("compression level with bits", plain(compression_level="2x", data_type="binary"), BOTH,
     'When "[mode]" or "[compression_level]" is set, "[data_type]" must be set to "[float]"'),
    ("mode beside method before 2.19", plain(mode="on_disk"), ("2.18.0",),
     '"[method]" and "[mode]" cannot both be set'),
    ("compression level beside method before 2.19", plain(compression_level="2x"), ("2.18.0",),
     '"[method]" and "[compression_level]" cannot both be set'),
    # space type
    ("unknown space", plain(space_type="l3"), BOTH,
     "Unable to find space: l3 . Valid values are: [l2, cosinesimil, l1, linf, innerproduct, hamming]"),
    ("both spellings of space", plain(space_type="l2", spaceType="l2"), BOTH,
     "Unable to parse SpaceType as it is duplicated."),
    ("conflicting spaces", plain(space_type="l2", method={**IVF, "space_type": "innerproduct"}), BOTH,
     'Cannot specify conflicting space types: "[innerproduct]" "[l2]"'),
    ("hamming with floats", plain(space_type="hamming"), BOTH,
     "Space type [hamming] is not supported with [float] data type"),
    ("l2 with bits", plain(space_type="l2", data_type="binary"), BOTH,
     "Space type [l2] is not supported with [binary] data type"),
    ("l1", plain(space_type="l1"), BOTH,
     failed('"ivf" with "faiss" configuration does not support space type: "l1".')),
    ("linf with hnsw", hnsw(encoder("pq"), body={"space_type": "linf"}), BOTH,
     failed('"hnsw" with "faiss" configuration does not support space type: "linf".')),
    ("cosine before 2.19", plain(spaceType="cosinesimil"), ("2.18.0",),
     failed('"ivf" with "faiss" configuration does not support space type: "cosinesimil".')),
    ("cosine of bytes since 3.5", plain(space_type="cosinesimil", data_type="byte"), ("3.5.0", NEW),
     failed("Faiss engine does not support cosine similarity with byte vectors. Cosine similarity requires vector "
            "normalization which is only supported for float vectors. Please use float data type or choose a different "
            "space type like l2 or inner_product.")),
    # engine
    ("unknown top-level engine", plain(engine="scann"), (NEW,), "Invalid engine type: scann"),
    ("another top-level engine", plain(engine="lucene", method={"name": "ivf"}), (NEW,),
     "Cannot specify engine other than FAISS for training"),
    ("unknown engine in method", plain(method={"name": "ivf", "engine": "scann"}), BOTH, "Invalid engine: scann"),
    ("conflicting engines", plain(engine="faiss", method={"name": "ivf", "engine": "lucene"}), (NEW,),
     "Cannot specify conflicting engines: [lucene] and [faiss]"),
    ("null engine in method", plain(method={"name": "ivf", "engine": None}), (NEW,),
     "Cannot specify conflicting engines: [undefined] and [faiss]"),
    ("lucene in method", plain(method={"name": "ivf", "engine": "lucene"}), BOTH,
     failed('Cannot use "lucene" engine from training context')),
    ("nmslib in method", plain(method={"name": "ivf", "engine": "nmslib"}), BOTH,
     failed('Cannot use "nmslib" engine from training context')),
    ("no engine before 2.18", plain(method={"name": "ivf"}), ("2.17.1",), "Invalid method name: ivf"),
    # the method object
    ("method is not an object", plain(method="ivf"), BOTH, "name needs to be set"),
    ("method without name", plain(method={"engine": "faiss"}), BOTH, "name needs to be set"),
    ("method name is a number", plain(method={"name": 1}), BOTH, "namehas to be a string"),
    ("unknown key in method", plain(method={**IVF, "nlist": 4}), BOTH, "Invalid parameter: nlist"),
    ("engine is a number", plain(method={"name": "ivf", "engine": 1}), BOTH, '"engine" must be a string'),
    ("space is a number", plain(method={"name": "ivf", "space_type": 1}), BOTH, '"space_type" must be a string'),
    ("unknown space in method", plain(method={"name": "ivf", "space_type": "l3"}), BOTH, "Invalid space_type: l3"),
    ("null space in method", plain(method={"name": "ivf", "space_type": None}), BOTH, "Invalid space_type: null"),
    ("parameters are a list", plain(method={**IVF, "parameters": []}), BOTH,
     "Unable to parse parameters for main method component"),
    ("unknown key in encoder", ivf({"name": "pq", "m": 4}), BOTH, "Invalid parameter for MethodComponentContext: m"),
    ("encoder without name", ivf({"parameters": {}}), BOTH, "name needs to be set"),
    ("encoder name is a number", ivf({"name": 1}), BOTH, "Component name should be a string"),
    ("encoder parameters are a list", ivf({"name": "pq", "parameters": []}), BOTH,
     "Unable to parse parameters for  method component"),
    ("unknown method", plain(method={"name": "lsh", "engine": "faiss"}), BOTH, "Invalid method name: lsh"),
    # parameters of the methods
    ("unknown parameter", ivf(nlists=4), BOTH, failed("Unknown parameter 'nlists' found")),
    ("nlist 0", ivf(nlist=0), BOTH, failed(bad_integer("nlist"))),
    ("nlist 20000", ivf(nlist=20000), BOTH, failed(bad_integer("nlist"))),
    ("nlist is text", ivf(nlist="4"), BOTH, failed(not_integer("nlist"))),
    ("nlist is a double", ivf(nlist=4.0), BOTH, failed(not_integer("nlist"))),
    ("nlist is a boolean", ivf(nlist=True), BOTH, failed(not_integer("nlist"))),
    ("nlist beyond 32 bits", ivf(nlist=2**31), BOTH, failed(not_integer("nlist"))),
    ("nprobes 0", ivf(nprobes=0), BOTH, failed(bad_integer("nprobes"))),
    ("nprobes 20000", ivf(nprobes=20000), BOTH, failed(bad_integer("nprobes"))),
    ("hnsw m -1", hnsw(encoder("pq"), m=-1), BOTH, failed(bad_integer("m"))),
    ("ef_construction 0", hnsw(encoder("pq"), ef_construction=0), BOTH, failed(bad_integer("ef_construction"))),
    ("ef_search 0", hnsw(encoder("pq"), ef_search=0), BOTH, failed(bad_integer("ef_search"))),
    ("hnsw without encoder", hnsw(), BOTH, failed("Method does not require training.")),
    ("hnsw flat", hnsw(encoder("flat")), BOTH, failed("Method does not require training.")),
    ("hnsw binary", hnsw(encoder("binary", bits=1)), BOTH, failed("Method does not require training.")),
    ("hnsw m does not divide, m given", hnsw(encoder("pq", m=4), m=5), BOTH, failed(PQ_M)),
    ("hnsw default m does not divide, 2.19", hnsw(encoder("pq", m=4), body={"dimension": 24}), (OLD,), failed(PQ_M)),
    ("ivf with an m of its own", ivf(encoder("pq"), m=5), (NEW,), failed(PQ_M)),
    # encoders
    ("unknown encoder", ivf(encoder("opq")), (NEW,), failed(NO_ENCODER)),
    ("flat with a parameter", ivf(encoder("flat", m=1)), BOTH, failed(NO_ENCODER)),
    ("pq m 0", ivf(encoder("pq", m=-1)), BOTH, failed(NO_ENCODER)),
    ("pq m does not divide", ivf(encoder("pq", m=3)), BOTH, failed(NO_ENCODER)),
    ("pq m 1024", ivf(encoder("pq", m=1024), body={"dimension": 2048}), BOTH, failed(NO_ENCODER)),
    ("pq m is text", ivf(encoder("pq", m="4")), BOTH, failed(NO_ENCODER)),
    ("pq unknown parameter", ivf(encoder("pq", bits=8)), BOTH, failed(NO_ENCODER)),
    ("pq m and code_size, m does not divide", ivf(encoder("pq", m=3, code_size=8)), BOTH, failed(bad_integer("m"))),
    ("pq m and code_size, code_size 0", ivf(encoder("pq", m=4, code_size=0)), BOTH, failed(bad_integer("code_size"))),
    ("pq code_size 128", ivf(encoder("pq", m=4, code_size=128)), BOTH, failed(bad_integer("code_size"))),
    ("pq code_size 128 alone", ivf(encoder("pq", code_size=128)), BOTH, failed(NO_ENCODER)),
    ("hnsw pq code_size 4", hnsw(encoder("pq", m=4, code_size=4)), BOTH, failed(bad_integer("code_size"))),
    ("hnsw pq code_size 4 alone", hnsw(encoder("pq", code_size=4)), BOTH, failed(NO_ENCODER)),
    ("sq without bits since 3.6", ivf(encoder("sq")), (NEW,),
     failed("Parameter [bits] is required for encoder [sq] on indices created with version 3.6.0 or later. "
            "Supported values: [1, 16]")),
    ("sq bits before 3.6", ivf(encoder("sq", bits=16)), (OLD, "3.5.0"), failed(NO_ENCODER)),
    ("sq bits 8", ivf(encoder("sq", bits=8)), (NEW,), "Unsupported bits value: 8"),
    ("sq bits as text", ivf(encoder("sq", bits="16")), (NEW,), failed(NO_ENCODER)),
    ("sq type int8", ivf(encoder("sq", type="int8", bits=16)), (NEW,), failed(NO_ENCODER)),
    ("sq type int8, 2.19", ivf(encoder("sq", type="int8")), (OLD,), failed(NO_ENCODER)),
    ("sq type is a number", ivf(encoder("sq", type=1, bits=16)), (NEW,), failed(NO_ENCODER)),
    ("sq clip is text", ivf(encoder("sq", clip="true", bits=16)), (NEW,), failed(NO_ENCODER)),
    ("sq one bit with type", ivf(encoder("sq", bits=1, type="fp16")), (NEW,),
     failed("Parameter [type] is not supported when [bits=1] for encoder [sq]. "
            "The type parameter is only applicable for fp16 quantization (bits=16).")),
    ("sq one bit with clip", ivf(encoder("sq", bits=1, clip=True)), (NEW,),
     failed("Parameter [clip] is not supported when [bits=1] for encoder [sq]. "
            "Clipping is only applicable for fp16 quantization (bits=16).")),
    ("sq 16 bits at 32x", ivf(encoder("sq", bits=16), body={"compression_level": "32x"}), (NEW,),
     failed("Compression level [32x] is incompatible with [bits=16] for encoder [sq]. "
            "Expected compression level: [2x]")),
    ("sq 1 bit at 2x", ivf(encoder("sq", bits=1), body={"compression_level": "2x"}), (NEW,),
     failed("Compression level [2x] is incompatible with [bits=1] for encoder [sq]. "
            "Expected compression level: [32x]")),
    ("binary bits 3", ivf(encoder("binary", bits=3)), BOTH, failed(bad_integer("bits"))),
    ("binary bits as text", ivf(encoder("binary", bits="1")), BOTH, failed(not_integer("bits"))),
    ("binary rotation before 3.2", ivf(encoder("binary", random_rotation=True)), (OLD,), failed(NO_ENCODER)),
    ("binary rotation as text", ivf(encoder("binary", random_rotation="yes")), (NEW,), failed(NO_ENCODER)),
    # data types
    ("bits not in whole bytes", plain(data_type="binary", dimension=12), BOTH,
     failed("Dimension should be multiply of 8 for binary vector data type")),
    ("pq of bytes", ivf(encoder("pq"), body={"data_type": "byte"}), BOTH,
     failed(NO_ENCODER, "encoder is not supported for vector data type [byte]")),
    ("binary encoder of bits", ivf(encoder("binary", bits=1), body={"data_type": "binary"}), BOTH,
     failed(NO_ENCODER, "encoder is not supported for vector data type [binary]")),
    ("sq of bytes, 2.19", ivf(encoder("sq"), body={"data_type": "byte"}), (OLD,),
     failed(NO_ENCODER, "encoder is not supported for vector data type [byte]")),
    ("sq of bytes needs no bits", ivf(encoder("sq"), body={"data_type": "byte"}), (NEW,),
     failed(NO_ENCODER, "encoder is not supported for vector data type [byte]")),
    # compression
    ("4x", {**WITHOUT_METHOD, "compression_level": "4x"}, ("3.2.0", OLD),
     failed('"faiss" does not support "4x" compression')),
    ("4x since 3.3", {**WITHOUT_METHOD, "compression_level": "4x"}, (NEW,),
     "Lucene is the only engine that supports 4x compression"),
    ("4x with an engine in method", plain(compression_level="4x"), BOTH,
     failed('"faiss" does not support "4x" compression')),
    ("64x", {**WITHOUT_METHOD, "compression_level": "64x"}, BOTH, failed('"faiss" does not support "64x" compression')),
    ("on_disk at 1x before 3.1", {**WITHOUT_METHOD, "mode": "on_disk", "compression_level": "1x"}, (OLD, "3.0.0"),
     failed('Cannot specify "x1" compression level when using "on_disk" mode')),
    ("flat at 2x", ivf(encoder("flat"), body={"compression_level": "2x"}), BOTH, failed(CONFLICT)),
    ("pq at another level", ivf(encoder("pq", m=4, code_size=8), body={"compression_level": "8x"}), BOTH,
     failed(CONFLICT)),
    ("binary at another level", ivf(encoder("binary", bits=2), body={"compression_level": "8x"}), BOTH,
     failed(CONFLICT)),
    ("sq at 1x", ivf(encoder("sq"), body={"compression_level": "1x"}), (OLD,), failed(CONFLICT)),
    ("hnsw at 32x", hnsw(body={"compression_level": "32x"}), BOTH, failed("Method does not require training.")),
    # several at once
    ("several findings", ivf(nlist=0, body={"space_type": "l1", "description": "d" * 1001}), BOTH,
     failed('"ivf" with "faiss" configuration does not support space type: "l1".', bad_integer("nlist"),
            "Description exceeds limit of 1000 characters")),
    ("early m is numbered last, 2.19", hnsw(body={"dimension": 24, "description": "d" * 1001}), (OLD,),
     failed("Method does not require training.", "Description exceeds limit of 1000 characters", PQ_M)),
]  # fmt: skip

# Cases the plugin only sees at the cluster, or answers with 500: the words are ours or come from elsewhere.
REFUSED_OURSELVES: list[tuple[str, object, tuple[str, ...], str]] = [
    ("no body", "  ", (NEW,), "request body is required"),
    ("not JSON", "{", (NEW,), "request body is not valid JSON: "),
    ("not a JSON number", '{"dimension": NaN}', (NEW,), "request body is not valid JSON: NaN is not a JSON number"),
    ("not UTF-8", b"\xff{}", (NEW,), "request body is not valid JSON: "),
    ("not an object", "[]", (NEW,),
     "Failed to parse object: expecting token of type [START_OBJECT] but found [START_ARRAY]"),
    ("duplicated field", '{"dimension": 4, "dimension": 5}', (NEW,), "Duplicate field 'dimension'"),
    ("duplicated parameter", '{"method": {"name": "ivf", "parameters": {"nlist": 4, "nlist": 5}}}', (NEW,),
     "Duplicate field 'nlist'"),
    ("null dimension", plain(dimension=None), (NEW,), '"dimension" must be an integer, not null'),
    ("object as dimension", plain(dimension={}), (NEW,), '"dimension" must be an integer, not {}'),
    ("null data type", plain(data_type=None), (NEW,), "Can't get text on a VALUE_NULL: \"data_type\" must be a string"),
    ("list as field", plain(training_field=["f"]), (NEW,),
     "Can't get text on a START_ARRAY: \"training_field\" must be a string"),
    ("object as index", plain(training_index={}), (NEW,),
     "Can't get text on a START_OBJECT: \"training_index\" must be a string"),
    ("null description", plain(description=None), (NEW,), '"description" must not be null'),
    ("null parameter", ivf(nlist=None), (NEW,), "Parameter [nlist] must not be null."),
    ("encoder is text", ivf("pq"), (NEW,),
     failed("value is not an instance of for MethodComponentContext parameter [encoder].")),
    ("unknown encoder, 2.19", ivf(encoder("opq")), (OLD,), failed(NO_ENCODER)),
    ("sq clip is text, 2.19", ivf(encoder("sq", clip="true")), (OLD,), failed(NO_ENCODER)),
    ("hnsw with unknown encoder", hnsw(encoder("opq")), (NEW,), failed(NO_ENCODER)),
    ("pq m 0", ivf(encoder("pq", m=0)), (NEW,), failed(NO_ENCODER)),
    ("hnsw m 0", hnsw(encoder("pq"), m=0), BOTH, failed(bad_integer("m"))),
    ("dimension 0", plain(dimension=0), (NEW,), failed("Dimension value must be greater than 0, but is 0")),
    ("dimension -2", plain(dimension=-2), (NEW,), failed("Dimension value must be greater than 0, but is -2")),
    ("adc with two bits", ivf(encoder("binary", bits=2, enable_adc=True)), (NEW,),
     "Validation Failed: ADC is not supported for bit count: 2"),
]  # fmt: skip


def rows(table: list[tuple[str, object, tuple[str, ...], str]]) -> list[Any]:
    return [
        pytest.param(body, version, message, id=f"{name} ({version})")
        for name, body, versions, message in table
        for version in versions
    ]


@pytest.mark.parametrize(("body", "version", "message"), rows(REFUSED))
def test_refused_in_the_plugins_words(body: object, version: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body, version)
    assert str(caught.value) == message


@pytest.mark.parametrize(("body", "version", "message"), rows(REFUSED_OURSELVES))
def test_refused_where_the_plugin_has_no_words(body: object, version: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body, version)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"target_version": "three"}, 'target version "three" is not a version; give it as 3.6.0'),
        ({"target_version": "3"}, 'target version "3" is not a version; give it as 3.6.0'),
        ({"target_version": "2.16.0"}, "target version 2.16.0 is too old: 2.17.0 is the oldest supported"),
        ({"preference": "a", "node_id": "b"}, 'preference "a" and node_id "b" mean the same but differ'),
        (
            {"model_id": "i" * 513},
            failed(f"id [{'i' * 513}] is too long, must be no longer than 512 bytes but was: 513"),
        ),
    ],
)
def test_refuses_what_stands_outside_the_body(keywords: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        TrainingRequest.parse(json.dumps(PLAIN), **keywords)  # type: ignore[arg-type]
    assert str(caught.value) == message


FP16 = {"type": "fp16", "clip": False}
# (id, body, versions, index description, encoder as stored, compression level as stored)
RESOLVED: list[tuple[str, dict[str, Any], tuple[str, ...], str, dict[str, Any], str | None]] = [
    ("ivf alone", PLAIN, BOTH, "IVF4,Flat", encoder("flat"), "1x"),
    ("no engine", plain(method={"name": "ivf"}), BOTH, "IVF4,Flat", encoder("flat"), "1x"),
    ("null parameters", plain(method={**IVF, "parameters": None}), BOTH, "IVF4,Flat", encoder("flat"), "1x"),
    ("null encoder parameters", ivf({"name": "pq", "parameters": None}), BOTH, "IVF4,PQ1x8", encoder("pq"), None),
    ("encoder without parameters", ivf({"name": "pq"}), BOTH, "IVF4,PQ1x8", encoder("pq"), None),
    ("ivf flat", ivf(encoder("flat"), nlist=19999), BOTH, "IVF19999,Flat", encoder("flat"), "1x"),
    ("pq, only m", ivf(encoder("pq", m=4)), BOTH, "IVF4,PQ4x8", encoder("pq", m=4), None),
    ("pq 64x", ivf(encoder("pq", m=1, code_size=8)), BOTH, "IVF4,PQ1x8", encoder("pq", m=1, code_size=8), "64x"),
    ("pq 32x", ivf(encoder("pq", m=2, code_size=8)), BOTH, "IVF4,PQ2x8", encoder("pq", m=2, code_size=8), "32x"),
    ("pq 16x", ivf(encoder("pq", m=4, code_size=8)), BOTH, "IVF4,PQ4x8", encoder("pq", m=4, code_size=8), "16x"),
    ("pq 8x", ivf(encoder("pq", m=8, code_size=8)), BOTH, "IVF4,PQ8x8", encoder("pq", m=8, code_size=8), "8x"),
    ("pq 4x", ivf(encoder("pq", m=16, code_size=8)), BOTH, "IVF4,PQ16x8", encoder("pq", m=16, code_size=8), "4x"),
    ("pq 2x", ivf(encoder("pq", m=16, code_size=9)), BOTH, "IVF4,PQ16x9", encoder("pq", m=16, code_size=9), "2x"),
    ("pq 1x", ivf(encoder("pq", m=16, code_size=17)), BOTH, "IVF4,PQ16x17", encoder("pq", m=16, code_size=17), "1x"),
    ("pq at its own level", ivf(encoder("pq", m=4, code_size=8), body={"compression_level": "16x"}), BOTH,
     "IVF4,PQ4x8", encoder("pq", m=4, code_size=8), "16x"),
    ("pq before 2.18", ivf(encoder("pq", m=4, code_size=8)), ("2.17.1",), "IVF4,PQ4x8",
     encoder("pq", m=4, code_size=8), None),
    ("pq at a level it does not tell", ivf(encoder("pq", m=4), body={"compression_level": "8x"}), BOTH,
     "IVF4,PQ4x8", encoder("pq", m=4), None),
    ("hnsw pq", hnsw(encoder("pq", m=4)), BOTH, "HNSW16,PQ4", encoder("pq", m=4), None),
    ("hnsw pq, m divides", hnsw(encoder("pq", m=4), m=8), BOTH, "HNSW8,PQ4", encoder("pq", m=4), None),
    ("hnsw pq, default m does not divide, 3.0", hnsw(encoder("pq", m=4), body={"dimension": 24}), ("3.0.0", NEW),
     "HNSW16,PQ4", encoder("pq", m=4), None),
    ("hnsw pq, m before 2.19", hnsw(encoder("pq", m=4), m=5), ("2.18.0",), "HNSW5,PQ4", encoder("pq", m=4), None),
    ("sq, 2.19", ivf(encoder("sq")), (OLD, "3.5.0"), "IVF4,SQfp16", encoder("sq"), "2x"),
    ("sq 16 bits", ivf(encoder("sq", bits=16)), (NEW,), "IVF4,SQfp16", encoder("sq", bits=16), "2x"),
    ("sq 16 bits, clipped", ivf(encoder("sq", bits=16, clip=True, type="fp16")), (NEW,), "IVF4,SQfp16",
     encoder("sq", bits=16, clip=True, type="fp16"), "2x"),
    ("sq 1 bit", ivf(encoder("sq", bits=1)), (NEW,), "IVF4,Flat", encoder("sq", bits=1), "32x"),
    ("binary", ivf(encoder("binary")), BOTH, "BIVF4,Flat", encoder("binary"), None),
    ("binary 1 bit", ivf(encoder("binary", bits=1)), BOTH, "BIVF4,Flat", encoder("binary", bits=1), "32x"),
    ("binary 2 bits", ivf(encoder("binary", bits=2)), BOTH, "BIVF4,Flat", encoder("binary", bits=2), "16x"),
    ("binary 4 bits", ivf(encoder("binary", bits=4)), BOTH, "BIVF4,Flat", encoder("binary", bits=4), "8x"),
    ("binary with adc", ivf(encoder("binary", bits=1, enable_adc=True)), (NEW,), "BIVF4,Flat",
     encoder("binary", bits=1, enable_adc=True), "32x"),
    ("bytes", plain(data_type="byte"), BOTH, "IVF4,SQ8_direct_signed", encoder("flat"), "1x"),
    ("bits", plain(data_type="binary"), BOTH, "BIVF4,Flat", encoder("flat"), "1x"),
    ("in_memory", {**WITHOUT_METHOD, "mode": "in_memory"}, BOTH, "IVF4,Flat", encoder("flat"), "1x"),
    ("1x", {**WITHOUT_METHOD, "compression_level": "1x"}, BOTH, "IVF4,Flat", encoder("flat"), "1x"),
    ("empty mode", {**WITHOUT_METHOD, "mode": ""}, BOTH, "IVF4,Flat", encoder("flat"), "1x"),
    ("2x, 2.19", {**WITHOUT_METHOD, "compression_level": "2x"}, (OLD, "3.5.0"), "IVF4,SQfp16",
     encoder("sq", **FP16), "2x"),
    ("2x", {**WITHOUT_METHOD, "compression_level": "2x"}, (NEW,), "IVF4,SQfp16", encoder("sq", bits=16, **FP16), "2x"),
    ("8x, 2.19", {**WITHOUT_METHOD, "compression_level": "8x"}, (OLD,), "BIVF4,Flat", encoder("binary", bits=4), "8x"),
    ("8x", {**WITHOUT_METHOD, "compression_level": "8x"}, ("3.2.0", NEW), "BIVF4,Flat",
     encoder("binary", bits=4, random_rotation=False, enable_adc=False), "8x"),
    ("16x", {**WITHOUT_METHOD, "compression_level": "16x"}, (NEW,), "BIVF4,Flat",
     encoder("binary", bits=2, random_rotation=False, enable_adc=False), "16x"),
    ("32x, 2.19", {**WITHOUT_METHOD, "compression_level": "32x"}, (OLD,), "BIVF4,Flat",
     encoder("binary", bits=1), "32x"),
    ("32x, 3.5", {**WITHOUT_METHOD, "compression_level": "32x"}, ("3.5.0",), "BIVF4,Flat",
     encoder("binary", bits=1, random_rotation=False, enable_adc=False), "32x"),
    ("32x", {**WITHOUT_METHOD, "compression_level": "32x"}, (NEW, "4.0.0"), "IVF4,Flat", encoder("sq", bits=1), "32x"),
    ("on_disk, 2.19", {**WITHOUT_METHOD, "mode": "on_disk"}, (OLD,), "BIVF4,Flat", encoder("binary", bits=1), "32x"),
    ("on_disk", {**WITHOUT_METHOD, "mode": "on_disk"}, (NEW,), "IVF4,Flat", encoder("sq", bits=1), "32x"),
    ("on_disk in another case", {**WITHOUT_METHOD, "mode": "ON_DISK"}, (NEW,), "IVF4,Flat",
     encoder("sq", bits=1), "32x"),
    ("on_disk at 2x", {**WITHOUT_METHOD, "mode": "on_disk", "compression_level": "2x"}, (NEW,), "IVF4,SQfp16",
     encoder("sq", bits=16, **FP16), "2x"),
    ("on_disk at 1x since 3.1", {**WITHOUT_METHOD, "mode": "on_disk", "compression_level": "1x"}, ("3.1.0", NEW),
     "IVF4,Flat", encoder("flat"), "1x"),
    ("on_disk beside method", ivf(nlist=64, body={"mode": "on_disk"}), (NEW,), "IVF64,Flat",
     encoder("sq", bits=1), "32x"),
    ("on_disk beside an encoder", ivf(encoder("pq", m=4, code_size=8), body={"mode": "on_disk"}), BOTH, "IVF4,PQ4x8",
     encoder("pq", m=4, code_size=8), "16x"),
    ("8x beside method, 2.19", ivf(nlist=64, body={"compression_level": "8x"}), (OLD,), "BIVF64,Flat",
     encoder("binary", bits=4), "8x"),
]  # fmt: skip
RESOLVED_ROWS = [
    pytest.param(body, version, *expected, id=f"{name} ({version})")
    for name, body, versions, *expected in RESOLVED
    for version in versions
]


@pytest.mark.parametrize(("body", "version", "description", "stored", "level"), RESOLVED_ROWS)
def test_resolved_as_the_plugin_does(
    body: dict[str, Any], version: str, description: str, stored: dict[str, Any], level: str | None
) -> None:
    request = parse(body, version)
    assert request.index_description == description
    assert request.model_definition["parameters"]["encoder"] == stored
    assert request.compression_level == level
    assert request.mode == (body.get("mode", "").lower() or None)


@pytest.mark.parametrize(("body", "version", "description", "stored", "level"), RESOLVED_ROWS)
def test_body_says_the_same_again(
    body: dict[str, Any], version: str, description: str, stored: dict[str, Any], level: str | None
) -> None:
    request = parse(body, version, model_id="m", preference="n")
    again = parse(request.body(), version, model_id="m", preference="n")
    assert again == request


def test_defaults() -> None:
    request = parse(PLAIN)
    assert dataclasses.asdict(request) == {
        "model_id": None,
        "preference": None,
        "training_index": "train",
        "training_field": "vector",
        "dimension": 16,
        "max_training_vector_count": 2147483647,
        "search_size": 10000,
        "description": "",
        "method": {
            "name": "ivf",
            "parameters": {"nlist": 4, "nprobes": 1},
            "encoder": {"name": "flat", "parameters": {}},
        },
        "space_type": "l2",
        "data_type": "float",
        "mode": None,
        "compression_level": "1x",
        "target_version": "3.6.0",
        "engine": "faiss",
    }


def test_keeps_what_is_given() -> None:
    fields = {
        "training_index": 7,
        "training_field": "a.b.vector",
        "dimension": "16",
        "max_training_vector_count": 5000.0,
        "search_size": 100,
        "description": "d" * 1000,
        "spaceType": "InnerProduct",
        "data_type": "FLOAT",
        "method": {"name": "hnsw", "parameters": {"m": 8, "ef_search": 50, "encoder": encoder("pq", m=4)}},
    }
    request = parse(fields, "2.19", model_id="m1", node_id="n1")
    assert (request.model_id, request.preference) == ("m1", "n1")
    assert (request.training_index, request.training_field) == ("7", "a.b.vector")
    assert (request.dimension, request.max_training_vector_count, request.search_size) == (16, 5000, 100)
    assert (request.space_type, request.data_type, request.description) == ("innerproduct", "float", "d" * 1000)
    assert request.method.parameters == {"m": 8, "ef_construction": 100, "ef_search": 50}
    assert (request.hnsw_m, request.ef_construction, request.ef_search) == (8, 100, 50)
    assert (request.pq_m, request.code_size, request.nlist, request.nprobes) == (4, 8, None, None)
    assert request.target_version == "2.19.0"
    assert TrainingRequest.from_fields(fields, target_version="2.19", model_id="m1", node_id="n1") == request
    body = {**request.body(), "training_index": request.training_index}
    assert parse(body, "2.19", model_id="m1", preference="n1") == request


def test_minus_one_means_not_set() -> None:
    request = parse(plain(max_training_vector_count=-1, search_size=-1))
    assert (request.max_training_vector_count, request.search_size) == (2147483647, 10000)


@pytest.mark.parametrize("model_id", [None, "", "  "])
def test_a_blank_model_id_is_none(model_id: str | None) -> None:
    assert parse(PLAIN, model_id=model_id).model_id is None


def test_index_and_field_may_be_missing_where_nothing_reads_them() -> None:
    request = parse({"dimension": 16, "method": IVF}, require_index=False, require_field=False)
    assert (request.training_index, request.training_field) == (None, "")
    assert request.body().keys() == {"dimension", "data_type", "method"}


def test_fields_obey_the_same_rules() -> None:
    with pytest.raises(RequestError) as caught:
        TrainingRequest.from_fields(ivf(nlist=0), target_version=OLD)
    assert str(caught.value) == failed(bad_integer("nlist"))


@pytest.mark.parametrize(
    ("body", "space_type", "inner_product", "normalize"),
    [
        (PLAIN, "l2", False, False),
        (plain(space_type="innerproduct"), "innerproduct", True, False),
        (plain(space_type="cosinesimil"), "cosinesimil", True, True),
        (plain(method={**IVF, "space_type": "cosinesimil"}), "cosinesimil", True, True),
        (plain(space_type="l2", method={**IVF, "space_type": "L2"}), "l2", False, False),
        (plain(space_type="undefined"), "l2", False, False),
        (plain(data_type="binary"), "hamming", False, False),
        (ivf(encoder("binary", bits=1), body={"space_type": "innerproduct"}), "innerproduct", False, False),
    ],
)
def test_space_and_metric(body: dict[str, Any], space_type: str, inner_product: bool, normalize: bool) -> None:
    request = parse(body)
    assert (request.space_type, request.inner_product, request.normalize) == (space_type, inner_product, normalize)


def test_cosine_of_bytes_was_accepted_before_3_5() -> None:
    request = parse(plain(space_type="cosinesimil", data_type="byte"), "3.4.0")
    assert (request.space_type, request.index_description) == ("cosinesimil", "IVF4,SQ8_direct_signed")


@pytest.mark.parametrize(
    ("m", "ef", "level"),
    [(16, 100, "4x"), (8, 256, "8x"), (4, 256, "16x"), (2, 256, "32x"), (1, 100, "64x")],
)
def test_ef_defaults_follow_the_compression(m: int, ef: int, level: str) -> None:
    request = parse(hnsw(encoder("pq", m=m, code_size=8)))
    assert (request.compression_level, request.ef_construction, request.ef_search) == (level, ef, ef)


def test_a_given_ef_stays() -> None:
    request = parse(hnsw(encoder("pq", m=4, code_size=8), ef_search=10))
    assert (request.ef_construction, request.ef_search) == (256, 10)


@pytest.mark.parametrize(
    ("body", "minimum", "usable"),
    [
        (ivf(nlist=100), 100, 25600),
        (ivf(encoder("pq", m=4), nlist=100), 256, 65536),
        (ivf(encoder("pq", m=4), nlist=1000), 1000, 256000),
        (ivf(encoder("pq", m=4, code_size=10), nlist=1000), 1024, 262144),
        (hnsw(encoder("pq", m=4)), 256, 65536),
        (ivf(encoder("binary", bits=2), nlist=64), 64, 16384),
        (plain(data_type="byte"), 4, 1024),
    ],
)
def test_how_many_vectors_faiss_needs_and_uses(body: dict[str, Any], minimum: int, usable: int) -> None:
    request = parse(body)
    assert (request.minimum_vectors, request.usable_vectors) == (minimum, usable)


@pytest.mark.parametrize(
    ("body", "dimension"),
    [
        (PLAIN, 16),
        (plain(data_type="binary"), 16),
        (ivf(encoder("binary")), 16),
        (ivf(encoder("binary", bits=2)), 32),
        (ivf(encoder("binary", bits=4)), 64),
        (ivf(encoder("binary", bits=1), body={"dimension": 13}), 16),
        (ivf(encoder("binary", bits=4), body={"dimension": 13}), 56),
        (ivf(encoder("sq", bits=1)), 16),
    ],
)
def test_trained_dimension(body: dict[str, Any], dimension: int) -> None:
    assert parse(body).trained_dimension == dimension


def trained_blob(request: TrainingRequest) -> bytes:
    """What the plugin's JNI writes for this request, trained on noise."""
    rng = np.random.default_rng(0)
    if request.is_binary:
        index = faiss.index_binary_factory(request.trained_dimension, request.index_description)
        index.make_direct_map()
        index.train(rng.integers(0, 256, (300, request.trained_dimension // 8), dtype=np.uint8))
        return faiss.serialize_index_binary(index).tobytes()
    metric = faiss.METRIC_INNER_PRODUCT if request.inner_product else faiss.METRIC_L2
    # "np": permuting the codewords takes nearly all the time and no byte.
    description = request.index_description + ("np" if request.pq_m is not None else "")
    index = faiss.index_factory(request.trained_dimension, description, metric)
    if request.method.name == "ivf":
        index.make_direct_map()
    index.train(rng.standard_normal((300, request.dimension), dtype=np.float32))
    return faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(ivf(nlist=7), id="ivf flat"),
        pytest.param(ivf(nlist=7, body={"space_type": "innerproduct"}), id="ivf flat, inner product"),
        pytest.param(ivf(encoder("pq", m=4), nlist=5), id="ivf pq 8 bits"),
        pytest.param(ivf(encoder("pq", m=8, code_size=3), nlist=5), id="ivf pq 3 bits"),
        pytest.param(ivf(encoder("sq", bits=16), nlist=3), id="ivf sq"),
        pytest.param(ivf(encoder("sq", bits=1), nlist=3), id="ivf sq 1 bit"),
        pytest.param(ivf(nlist=3, body={"data_type": "byte"}), id="bytes"),
        pytest.param(ivf(nlist=6, body={"data_type": "binary"}), id="bits"),
        pytest.param(ivf(encoder("binary", bits=1), nlist=6), id="binary 1 bit"),
        pytest.param(ivf(encoder("binary", bits=2), nlist=6, body={"dimension": 13}), id="binary 2 bits, padded"),
        pytest.param(hnsw(encoder("pq", m=4)), id="hnsw pq"),
        pytest.param(hnsw(encoder("pq", m=2), m=2), id="hnsw pq, m 2"),
        pytest.param(hnsw(encoder("pq", m=2), m=1), id="hnsw pq, m 1"),
        pytest.param(hnsw(encoder("pq", m=64), m=128, body={"dimension": 128}), id="hnsw pq, m 128"),
    ],
)
def test_predicts_the_size_of_the_blob(body: dict[str, Any]) -> None:
    request = parse(body)
    assert request.blob_bytes == len(trained_blob(request))


PQ8 = encoder("pq", m=4, code_size=8)


# (body, version, fewest documents)
MINIMA: list[tuple[dict[str, Any], str, int]] = [
    (ivf(nlist=300), "2.18.0", 0),
    (ivf(nlist=300), OLD, 1000),
    (ivf(encoder("pq", m=4), nlist=300), OLD, 1000),
    (ivf(PQ8, nlist=300), OLD, 300),
    (ivf(PQ8), OLD, 256),
    (ivf(encoder("pq", m=4, code_size=2)), OLD, 4),
    (hnsw(PQ8), OLD, 1000),
    (plain(data_type="byte"), OLD, 1000),
    (ivf(nlist=300), "3.0.0", 0),
    (ivf(nlist=300), NEW, 0),
    (ivf(encoder("pq", m=4), nlist=300), NEW, 1000),
    (ivf(PQ8, nlist=300), NEW, 256),
    (hnsw(PQ8), NEW, 256),
    (hnsw(encoder("pq", m=4)), NEW, 1000),
]


@pytest.mark.parametrize(("body", "version", "minimum"), MINIMA)
def test_the_clusters_own_minimum_counts_documents(body: dict[str, Any], version: str, minimum: int) -> None:
    request = parse(body, version)
    request.check_count(20000, documents=minimum)
    request.check_count(20000)
    if minimum:
        with pytest.raises(RequestError) as caught:
            request.check_count(20000, documents=minimum - 1)
        assert str(caught.value) == failed(f"Number of training points should be greater than {minimum}")


def test_the_clusters_minimum_heeds_the_limit() -> None:
    request = parse(plain(max_training_vector_count=999), OLD)
    with pytest.raises(RequestError, match="should be greater than 1000;"):
        request.check_count(5000, documents=5000)


@pytest.mark.parametrize(
    ("body", "count", "message"),
    [
        (
            ivf(nlist=100),
            99,
            "nlist is 100, but there are only 99 training vectors: "
            "nlist must be at most 99, or at least 100 vectors are needed",
        ),
        (
            ivf(nlist=100, body={"max_training_vector_count": 50}),
            5000,
            "nlist is 100, but there are only 50 training vectors (max_training_vector_count is 50): "
            "nlist must be at most 50, or at least 100 vectors are needed",
        ),
        (
            hnsw(encoder("pq", m=4)),
            255,
            "code_size is 8, which needs 2^8 = 256 training vectors, but there are only 255",
        ),
        (
            ivf(encoder("pq", m=4, code_size=9)),
            300,
            "code_size is 9, which needs 2^9 = 512 training vectors, but there are only 300",
        ),
    ],
)
def test_too_few_vectors(body: dict[str, Any], count: int, message: str) -> None:
    request = parse(body)
    with pytest.raises(RequestError) as caught:
        request.check_count(count)
    assert str(caught.value) == message
    if request.max_training_vector_count > 5000:
        request.check_count(request.minimum_vectors)


def test_limits_are_silent_for_an_ordinary_model() -> None:
    assert parse(ivf(encoder("pq", m=8, code_size=8), nlist=1024, body={"dimension": 768})).check_limits() == []


def test_refuses_a_model_that_no_document_fits() -> None:
    bytes_by_cosine = parse(plain(space_type="cosinesimil", data_type="byte"), "3.4.0")
    message = (
        "space_type is cosinesimil and data_type byte, but OpenSearch 3.4.0 takes no document for such a model: it "
        "cannot normalise bytes. For vectors of one length innerproduct is the same; or take data_type float"
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        bytes_by_cosine.check_limits(allow_large_model=True)


def test_warns_of_nprobes_that_binary_models_lose() -> None:
    """The plugin's TrainBinaryIndex does not apply them: see nprobe in its blobs."""
    binary = {"dimension": 16, "data_type": "binary", "space_type": "hamming"}
    message = (
        "nprobes 3 is not stored in the model: of a binary index searches visit 1 list unless they say "
        '{"method_parameters": {"nprobes": 3}}'
    )
    assert parse(ivf(nprobes=3, body=binary)).check_limits() == [message]
    assert parse(ivf(encoder("binary", bits=1), nprobes=3)).check_limits() == [message]
    assert parse(ivf(nprobes=1, body=binary)).check_limits() == []


@pytest.mark.parametrize("code_size", [25, 127])
def test_refuses_a_code_size_faiss_cannot_train(code_size: int) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ivf(encoder("pq", m=1, code_size=code_size))).check_limits(allow_large_model=True)
    assert str(caught.value) == f"code_size is {code_size}, but faiss can train code sizes from 1 to 24 only"


def test_refuses_the_search_table_that_crashes_nodes() -> None:
    at_the_limit = ivf(encoder("pq", m=512, code_size=8), nlist=4096, body={"dimension": 512})
    beyond = ivf(encoder("pq", m=512, code_size=8), nlist=4097, body={"dimension": 512})
    assert parse(at_the_limit).check_limits() == []
    message = r"nlist 4097 .* 2148007936 bytes, but at most 2147483648 .*k-NN/issues/3078"
    with pytest.raises(RequestError, match=message):
        parse(beyond).check_limits(allow_large_model=True)
    # Only L2 has such a table.
    assert parse({**beyond, "space_type": "innerproduct"}).check_limits() == []


def test_large_models_need_leave() -> None:
    largest = parse(ivf(nlist=15000, body={"dimension": 624}))
    too_large = parse(ivf(nlist=15000, body={"dimension": 625}))
    assert (largest.blob_bytes, too_large.blob_bytes) == (37_440_139, 37_500_139)
    assert largest.check_limits() == []
    with pytest.raises(RequestError, match=r"the model has 37500139 bytes .* at most 37500000 unless"):
        too_large.check_limits()
    (warning,) = too_large.check_limits(allow_large_model=True)
    assert "37500139" in warning


def test_warns_of_a_compression_that_is_none() -> None:
    (warning,) = parse({**WITHOUT_METHOD, "mode": "on_disk"}).check_limits()
    assert "builds IVF4,Flat although it reports compression_level 32x" in warning


def verdict(body: dict[str, Any], version: str) -> object:
    """What a target version makes of a body, with 999 documents in the training index."""
    try:
        request = parse(body, version)
        request.check_count(20000, documents=999)
    except RequestError as error:
        return str(error)
    return request.index_description, request.model_definition, request.compression_level


# One row for each of VERSION_RULES, in its order: the last version before the rule, and a body the rule is about.
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("2.17.1", plain(space_type="l2")),
    ("2.17.1", plain(method={"name": "ivf"})),
    ("2.17.1", ivf(PQ8)),
    ("2.18.0", ivf(PQ8, body={"mode": "in_memory"})),
    ("2.18.0", ivf(PQ8, body={"space_type": "cosinesimil"})),
    ("2.18.0", PLAIN),
    ("2.18.0", hnsw(encoder("pq", m=4), body={"dimension": 24})),
    ("2.19.6", PLAIN),
    ("2.19.6", hnsw(PQ8, body={"dimension": 24})),
    ("3.0.0", {**WITHOUT_METHOD, "mode": "on_disk", "compression_level": "1x"}),
    ("3.1.0", ivf(encoder("binary", bits=1, random_rotation=True))),
    ("3.2.0", plain(engine="faiss")),
    ("3.2.0", {**WITHOUT_METHOD, "compression_level": "4x"}),
    ("3.2.0", plain(method={"name": "ivf", "engine": None})),
    ("3.4.0", plain(space_type="cosinesimil", data_type="byte")),
    ("3.5.0", ivf(encoder("sq"))),
    ("3.5.0", {**WITHOUT_METHOD, "mode": "on_disk"}),
]


@pytest.mark.parametrize(
    ("rule", "change"), list(zip(VERSION_RULES, CHANGES, strict=True)), ids=[rule for _, rule in VERSION_RULES]
)
def test_a_version_rule_changes_the_verdict(rule: tuple[str, str], change: tuple[str, dict[str, Any]]) -> None:
    since, (before, body) = rule[0], change
    assert verdict(body, before) != verdict(body, since)
    assert verdict(body, f"{since}-SNAPSHOT") == verdict(body, since)
