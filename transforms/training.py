# SPDX-License-Identifier: Apache-2.0
"""`TrainModel`: the one step that turns a sample into a model."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics

from transforms import progress
from transforms.comparison import Previous
from transforms.errors import TrainingError
from transforms.gate import Gate
from transforms.model import CREATED, FAILED, TrainedModel, blob_digest, metadata
from transforms.reading import METRICS
from transforms.request import TrainingRequest
from transforms.sampling import Sample
from transforms.trainer_process import TrainingJob, train_in_process


@dataclass
class TrainModel(beam.PTransform):
    """PCollection[Sample] -> PCollection[TrainedModel], one model for each sample.

    A training that fails gives a model in state `failed` with the reason, not an exception: it would fail again on
    each of the runner's retries.

    Attributes:
      request: what to train.
      model_id: of the model.
      held_out: how many rows of the sample are set aside, never trained on; the sample must have been asked for that
        many more.
      threads: training threads; 0 for the cores of the worker.
      niter, nredo: iterations and restarts of k-means; None for faiss's own, see `faiss_training.train`.
      provenance: facts about the source and the run to keep with the model. No secrets.
      corpus: vectors in the source, to evaluate the model for with the rows set aside; 0 to evaluate nothing.
      gate: bars for the evaluated model. One that misses them gives a model in state `failed`.
      previous: the model to compare with. If it is better kept, the new one is in state `failed`, and `kept` in its
        provenance says why.
    """

    request: TrainingRequest
    model_id: str
    held_out: int = 0
    threads: int = 0
    niter: int | None = None
    nredo: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    corpus: int = 0
    gate: Gate = field(default_factory=Gate)
    previous: Previous | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, samples: beam.PCollection[Sample]) -> beam.PCollection[TrainedModel]:
        return samples | "Train" >> beam.ParDo(_TrainFn(self)).with_output_types(TrainedModel)

    def display_data(self) -> dict[str, Any]:
        return {
            "model_id": self.model_id,
            "index_description": self.request.index_description,
            "space_type": self.request.space_type,
            "dimension": self.request.dimension,
            "held_out": self.held_out,
            "evaluate": bool(self.corpus),
        }


class _TrainFn(beam.DoFn):
    def __init__(self, transform: TrainModel):
        self._transform = transform
        self._sampled = Metrics.counter(METRICS, "vectors_sampled")
        self._msec = Metrics.distribution(METRICS, "train_msec")
        self._evaluate_msec = Metrics.distribution(METRICS, "evaluate_msec")
        self._recall = Metrics.distribution(METRICS, "recall_at_10_permille")
        self._imbalance = Metrics.distribution(METRICS, "imbalance_permille")

    def process(self, sample: Sample) -> Iterator[TrainedModel]:
        model = train_model(sample, self._transform)
        if model.state == CREATED:
            self._sampled.inc(model.provenance["vectors_sampled"])
            self._msec.update(int(1000 * model.provenance["seconds"]["train"]))
        if model.quality is not None and "at" in model.quality:
            # Beam's distributions hold whole numbers.
            self._evaluate_msec.update(int(1000 * model.quality["seconds"]))
            self._recall.update(int(1000 * model.quality["at"]["expected"]["10"]))
            if "lists" in model.quality:
                self._imbalance.update(int(1000 * model.quality["lists"]["imbalance_factor"]))
        yield model


def train_model(sample: Sample, transform: TrainModel) -> TrainedModel:
    """Trains in a child process and wraps the outcome; never raises TrainingError."""
    request, provenance = transform.request, {**transform.provenance, "versions": versions()}
    job = TrainingJob(
        body=request.body(),
        target_version=request.target_version,
        spills=sample.spills,
        threshold=sample.threshold,
        size=sample.size - transform.held_out,
        held_out=transform.held_out,
        threads=transform.threads or available_cores(),
        niter=transform.niter,
        nredo=transform.nredo,
        corpus=transform.corpus,
        nprobes=transform.gate.nprobes,
        previous=transform.previous,
    )
    start = time.monotonic()
    try:
        result = train_in_process(job, progress.report)
    except TrainingError as error:
        return TrainedModel(transform.model_id, metadata(request, FAILED, str(error)), None, provenance)
    provenance |= {
        "vectors_sampled": result.vectors,
        "vectors_held_out": result.held_out,
        "training_threads": job.threads,
        "training_gpus": result.gpus,
        "seconds": {**result.seconds, "training_process": time.monotonic() - start},
        "training_peak_memory_bytes": result.peak_memory,
    }
    quality = result.quality
    if quality is not None and transform.gate:
        quality = {**quality, "gate": asdict(transform.gate)}

    def failed(error: str) -> TrainedModel:
        return TrainedModel(transform.model_id, metadata(request, FAILED, error), None, provenance, quality)

    if result.kept or result.blob is None:
        provenance["kept"] = result.kept
        return failed(result.kept)
    missed = transform.gate.failures(quality) if transform.gate else []
    if missed:
        return failed("; ".join(missed))
    provenance |= blob_digest(result.blob)
    return TrainedModel(transform.model_id, metadata(request, CREATED), result.blob, provenance, quality)


def available_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what made the model."""
    packages = ("opensearch-knn-train", _faiss_package(), "apache-beam", "numpy")
    return {name: _version(name) for name in packages}


def _faiss_package() -> str:
    """The distribution that `import faiss` comes from: there are several."""
    return next(iter(importlib.metadata.packages_distributions().get("faiss", ["faiss-cpu"])))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
