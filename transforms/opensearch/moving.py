# SPDX-License-Identifier: Apache-2.0
"""A model's request on a cluster of another version: what was trained on 2.19 has other words for it on 3.6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transforms import method as methods
from transforms.errors import RequestError
from transforms.model import CREATED, metadata
from transforms.request import TrainingRequest
from transforms.versions import Version, parse_version


def request_at(request: TrainingRequest, version: str) -> TrainingRequest:
    """`request` as the cluster at `version` resolves it. Raises RequestError if it cannot have such a model."""
    # A model does not tell how large the pages were that it was read in, but they protect the heap of a data node.
    return replace(request_of(metadata(request, CREATED), version), search_size=request.search_size)


def request_of(model: Mapping[str, Any], version: str) -> TrainingRequest:
    """The request that makes a model like this one on a cluster at `version`.

    Args:
      model: the fields of the Get Model API.
      version: of the cluster, e.g. 3.6.0.

    Raises:
      RequestError: the model does not say how it was made, or that version cannot have such a model.
    """
    definition = model.get("model_definition") or {}
    if not definition.get("name"):
        raise RequestError("the model has no model_definition (it is from before 2.13): nothing says how it was made")
    parsed = parse_version(version)
    fields: dict[str, Any] = {
        "dimension": model["dimension"],
        "data_type": str(model.get("data_type") or "float").lower(),
        "description": model.get("description") or "",
    }
    if model.get("mode"):
        fields["mode"] = model["mode"]
    if model.get("mode") and parsed < (2, 19, 0):
        # There, mode and method exclude each other: the method is what mode and level resolve to.
        fields |= {"compression_level": model.get("compression_level"), "spaceType": model["space_type"]}
    else:
        fields["method"] = {
            "engine": "faiss",
            "space_type": model["space_type"],
            "name": definition["name"],
            "parameters": _parameters(definition, parsed),
        }
    fields = {name: value for name, value in fields.items() if value is not None}
    return TrainingRequest.from_fields(fields, target_version=version, require_index=False, require_field=False)


def _parameters(definition: Mapping[str, Any], version: Version) -> dict[str, Any]:
    """The method's parameters in the words of `version`."""
    parameters = dict(definition.get("parameters") or {})
    if definition["name"] == "hnsw" and parameters.get("m") == methods.HNSW_M_DEFAULT:
        del parameters["m"]  # a given m has to divide the dimension, the same default has not
    encoder = dict(parameters.get("encoder") or {})
    if encoder.get("name") == "sq":
        # `bits` came with 3.6, which insists on it; all that sq could be before is 16.
        given = dict(encoder.get("parameters") or {})
        if version >= (3, 6, 0):
            given = {"bits": 16, **given}
        elif given.get("bits") == 16:
            del given["bits"]
        encoder["parameters"] = given
        parameters["encoder"] = encoder
    return parameters
