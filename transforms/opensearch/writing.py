# SPDX-License-Identifier: Apache-2.0
"""`WriteToModelIndex`: models into a cluster, at the end of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam

from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, FAILED, TrainedModel
from transforms.opensearch.connection import OpenSearchConnection
from transforms.opensearch.publishing import publish, remove_marks
from transforms.opensearch.routes import AUTO
from transforms.opensearch.session import Session
from transforms.request import TrainingRequest
from transforms.sampling import Sample


@dataclass(frozen=True)
class WriteToModelIndexResult:
    """How a publication ended: `state` is `created`, or `failed` with the reason in `error`; else as PublishResult."""

    model_id: str
    state: str
    error: str = ""
    route: str | None = None
    explanation: str = ""
    exact: bool = False
    blob_sha256: str | None = None
    registration: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class WriteToModelIndex(beam.PTransform):
    """PCollection[TrainedModel] -> PCollection[WriteToModelIndexResult], one for each model.

    A publication that fails gives a result in state `failed`, not an exception: its requests have been tried often
    enough. A bundle that is done twice publishes once: the temporary index stays until the results are safe.

    Attributes:
      connection: to the cluster.
      request: what the models were trained for.
      route: one of `routes.ROUTES`.
      samples: PCollection[Sample], one sample, for the route `delegate`; its vectors are only loaded if it is taken.
      preference: id of the data node that should train.
      verify: as in `publish`.
      allow_large_model: as in `publish`.
    """

    connection: OpenSearchConnection
    request: TrainingRequest
    route: str = AUTO
    samples: beam.PCollection[Sample] | None = field(default=None, repr=False)
    preference: str | None = None
    verify: bool = True
    allow_large_model: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, models: beam.PCollection[TrainedModel]) -> beam.PCollection[WriteToModelIndexResult]:
        options = {"route": self.route, "preference": self.preference, "verify": self.verify}
        options["allow_large_model"] = self.allow_large_model
        sample = () if self.samples is None else (beam.pvalue.AsIter(self.samples),)
        return (
            models
            | "Publish"
            >> beam.ParDo(_PublishFn(self.connection, self.request, options), *sample).with_output_types(
                WriteToModelIndexResult
            )
            # Past this point the runner does not publish again.
            | "Keep results" >> beam.Reshuffle()
            | "Remove marks" >> beam.ParDo(_RemoveMarksFn(self.connection)).with_output_types(WriteToModelIndexResult)
        )

    def display_data(self) -> dict[str, Any]:
        return {"url": self.connection.url, "route": self.route, "verify": self.verify}


class _PublishFn(beam.DoFn):
    def __init__(self, connection: OpenSearchConnection, request: TrainingRequest, options: dict[str, Any]):
        self._connection = connection
        self._request = request
        self._options = options

    def process(self, model: TrainedModel, samples: Any = ()) -> Iterator[WriteToModelIndexResult]:
        if model.blob is None:
            yield WriteToModelIndexResult(model.model_id, model.state, model.error)
            return
        try:
            with Session(self._connection) as session:
                yield self._publish(session, model, next(iter(samples), None))
        except (RequestError, TrainingError) as error:
            yield WriteToModelIndexResult(model.model_id, FAILED, str(error))

    def _publish(self, session: Session, model: TrainedModel, sample: Sample | None) -> WriteToModelIndexResult:
        load = None if sample is None else sample.load
        result = publish(session, model, self._request, load, keep_mark=True, **self._options)
        return WriteToModelIndexResult(
            model.model_id,
            CREATED,
            "",
            result.route,
            result.explanation,
            result.exact,
            result.blob_sha256,
            result.registration,
            result.warnings,
        )


class _RemoveMarksFn(beam.DoFn):
    def __init__(self, connection: OpenSearchConnection):
        self._connection = connection

    def process(self, result: WriteToModelIndexResult) -> Iterator[WriteToModelIndexResult]:
        if result.state == CREATED:
            with Session(self._connection) as session:
                remove_marks(session, result.model_id)
        yield result
