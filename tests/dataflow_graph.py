# SPDX-License-Identifier: Apache-2.0
"""Builds the job that `knn-train` would send to Dataflow, without a cloud: `python -m tests.dataflow_graph FLAGS`.

Prints the serialised graph's size and labels, its resource hints, and every text in it, as one JSON object. Payloads
are unpacked: a pickled step is compressed and in base64, which would hide what is looked for.
"""

from __future__ import annotations

import base64
import bz2
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import TestOptions
from apache_beam.portability.api import beam_runner_api_pb2 as api

from pipelines.options import parse
from pipelines.plan import make_plans
from pipelines.train import build


def byte_strings(message: Any) -> Iterator[bytes]:
    """Every bytes and str value in a protocol buffer, as it is and unpacked."""
    for field, value in message.ListFields():
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        values = [*value.keys(), *value.values()] if is_map else value if _repeated(field, value) else [value]
        for each in values:
            if hasattr(each, "ListFields"):
                yield from byte_strings(each)
            elif isinstance(each, (bytes, str)):
                yield from _unpacked(each.encode() if isinstance(each, str) else each)
    if isinstance(message, api.FunctionSpec) and (kind := _PAYLOADS.get(message.urn)):
        yield from byte_strings(kind.FromString(message.payload))


#: What the payloads of steps are themselves.
_PAYLOADS = {
    "beam:transform:pardo:v1": api.ParDoPayload,
    "beam:transform:combine_globally:v1": api.CombinePayload,
    "beam:transform:combine_per_key:v1": api.CombinePayload,
}


def _unpacked(raw: bytes) -> Iterator[bytes]:
    """As it is, and decoded and decompressed for as long as that can be done."""
    yield raw
    with suppress(ValueError):
        raw = base64.b64decode(raw.replace(b"\n", b""), validate=True)
        yield raw
    for decompress in (zlib.decompress, bz2.decompress):
        with suppress(zlib.error, OSError, ValueError):
            yield decompress(raw)


def _repeated(field: Any, value: Any) -> bool:
    return not isinstance(value, (bytes, str)) and hasattr(value, "__iter__") and not hasattr(value, "ListFields")


def main(argv: list[str]) -> None:
    options, _ = parse(argv)
    options.view_as(TestOptions).dry_run = True  # Beam's own: everything but sending it
    pipeline = beam.Pipeline(options=options)
    build(pipeline, make_plans(options), options, "gs://bucket/temp/knn-train-run")
    graph = pipeline.run().job.proto_pipeline
    components = graph.components
    hints = {
        transform.unique_name: {
            urn: value.decode()
            for urn, value in components.environments[transform.environment_id].resource_hints.items()
        }
        for transform in components.transforms.values()
        if transform.environment_id in components.environments
    }
    texts = "\n".join(text.decode("latin-1") for text in byte_strings(graph))
    labels = sorted(transform.unique_name for transform in components.transforms.values())
    print(json.dumps({"bytes": graph.ByteSize(), "labels": labels, "hints": hints, "texts": texts}))


if __name__ == "__main__":
    main(sys.argv[1:])
