# SPDX-License-Identifier: Apache-2.0
"""The transforms for Beam YAML: configured with numbers, texts and mappings, where a program passes objects.

Where the cluster is and who asks come from `OPENSEARCH_*` variables; `url` wins over the variable. A `request` is the
Train API's body, or the path of a JSON file with it on any Beam filesystem.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import apache_beam as beam

from transforms import opensearch, sampling, training
from transforms.errors import TrainingError
from transforms.files import is_local
from transforms.model import CREATED, TrainedModel, random_model_id
from transforms.model_files import check_model_id
from transforms.model_ids import expand
from transforms.opensearch import OpenSearchConnection, writing
from transforms.opensearch.routes import AUTO
from transforms.opensearch.writing import WriteToModelIndexResult
from transforms.request import TrainingRequest
from transforms.request_body import read_request
from transforms.sampling import Sample, keep_fraction
from transforms.vectors import VectorBlock
from transforms.versions import NEWEST_TARGET

#: Rows that a sample has beyond its size, to try the model with: `SampleVectors` adds and `TrainModel` takes them.
HELD_OUT = 16


class ReadFromOpenSearch(beam.PTransform):
    """Vectors of an index, as `transforms.opensearch.ReadFromOpenSearch` reads them.

    Args:
      index: index, alias, data stream or wildcard.
      field: dotted path of a `knn_vector`.
      dimension: of the field.
      data_type: float, byte or binary.
      sample_size: how many `SampleVectors` will keep; a little more is read, instead of all.
      query: only documents that match it.
      seed: decides the sample.
      url: of the cluster; `$OPENSEARCH_URL` by default.
    """

    def __init__(
        self,
        index: str,
        field: str,
        dimension: int,
        data_type: str = "float",
        sample_size: int | None = None,
        query: Mapping[str, Any] | None = None,
        seed: int = 0,
        url: str | None = None,
    ):
        super().__init__()
        self._read = opensearch.ReadFromOpenSearch(
            OpenSearchConnection.from_env(url=url),
            index,
            field,
            dimension,
            data_type,
            None if query is None else dict(query),
            seed,
        )
        self._sample_size = sample_size

    def expand(self, begin: Any) -> beam.PCollection[VectorBlock]:
        if self._sample_size is not None:
            # The count is exact, so that fewer are left than are to be kept is rarer than 1e-9.
            self._read.keep = keep_fraction(self._sample_size + HELD_OUT, self._read.source().summary().count)
        return begin | self._read


class SampleVectors(beam.PTransform):
    """A uniform sample of `size` vectors, kept in files under `folder`, which workers share and you remove."""

    def __init__(self, size: int, folder: str):
        super().__init__()
        if is_local(folder):
            os.makedirs(folder, exist_ok=True)
        self._sample = sampling.SampleVectors(size + HELD_OUT, folder)

    def expand(self, blocks: beam.PCollection[VectorBlock]) -> beam.PCollection[Sample]:
        return blocks | self._sample


class TrainModel(beam.PTransform):
    """A model of the sample.

    Args:
      request: what to train; `training_index` and `training_field` are not needed.
      model_id: may have the placeholders of `model_ids.expand`; random by default.
      target_version: of the OpenSearch that will serve it.
      threads: training threads; 0 for all cores.
    """

    def __init__(
        self,
        request: Mapping[str, Any] | str,
        model_id: str | None = None,
        target_version: str = NEWEST_TARGET,
        threads: int = 0,
    ):
        super().__init__()
        parsed = _request(request, target_version)
        question = {"request": parsed.body(), "target_version": parsed.target_version}
        name = random_model_id() if model_id is None else expand(model_id, datetime.now(timezone.utc), question)
        self._train = training.TrainModel(parsed, check_model_id(name), HELD_OUT, threads)

    def expand(self, samples: beam.PCollection[Sample]) -> beam.PCollection[TrainedModel]:
        return samples | self._train


class WriteToModelIndex(beam.PTransform):
    """Publishes models; gives a row of `WriteToModelIndexResult` for each. One that fails ends the pipeline.

    Args:
      request: what the models were trained for.
      route: auto, replay or swap.
      verify: try the model in a mapping and a search.
      target_version: as in `TrainModel`.
      url: of the cluster; `$OPENSEARCH_URL` by default.
    """

    def __init__(
        self,
        request: Mapping[str, Any] | str,
        route: str = AUTO,
        verify: bool = True,
        target_version: str = NEWEST_TARGET,
        url: str | None = None,
    ):
        super().__init__()
        connection = OpenSearchConnection.from_env(url=url)
        parsed = _request(request, target_version)
        self._write = writing.WriteToModelIndex(connection, parsed, route, verify=verify)

    def expand(self, models: beam.PCollection[TrainedModel]) -> beam.PCollection[beam.Row]:
        return models | self._write | "To rows" >> beam.Map(_row).with_output_types(_ROW)


def _request(request: Mapping[str, Any] | str, target_version: str) -> TrainingRequest:
    body = read_request(request) if isinstance(request, str) else json.dumps(request)
    return TrainingRequest.parse(body, target_version=target_version, require_index=False, require_field=False)


#: The fields of a result that a table can hold.
_FIELDS = {"model_id": str, "state": str, "route": str, "explanation": str, "exact": bool, "blob_sha256": str}
_ROW = beam.row_type.RowTypeConstraint.from_fields(list(_FIELDS.items()))


def _row(result: WriteToModelIndexResult) -> beam.Row:
    if result.state != CREATED:
        raise TrainingError(f'model "{result.model_id}": {result.error}')
    told = asdict(result)
    return beam.Row(**{name: told[name] for name in _FIELDS})
