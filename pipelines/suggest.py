# SPDX-License-Identifier: Apache-2.0
"""`knn-train --suggest`: tries several requests on one sample and prints the best, ready to train. Writes no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import apache_beam as beam

from pipelines import display
from pipelines.options import TrainOptions
from pipelines.plan import Plan, reading_once, sample_size_of
from transforms.errors import RequestError
from transforms.files import join, read_whole, write_whole
from transforms.gate import Gate, LeastRecall
from transforms.sampling import Sample
from transforms.suggest import Trial, best, candidates, ready
from transforms.training import TrainModel, train_model


def check(options: TrainOptions) -> None:
    """Raises RequestError for flags that do not go together."""
    if options.min_recall is None and options.max_bytes_per_vector is None:
        raise RequestError("--suggest needs --min_recall or --max_bytes_per_vector: the best under what?")
    if options.max_bytes_per_vector is not None and not options.max_bytes_per_vector > 0:
        raise RequestError(f"max_bytes_per_vector is {options.max_bytes_per_vector:g}, but must be above 0")
    if options.publish or options.resume or options.compare_to is not None or len(options.request or ()) > 1:
        raise RequestError("--suggest writes no model: one --request, and no --publish, --resume or --compare_to")
    if not options.eval_vectors:
        raise RequestError("eval_vectors is 0, but --suggest needs some to measure")
    if options.max_imbalance is not None:
        raise RequestError("--suggest chooses by recall and bytes: it takes no --max_imbalance")
    if options.min_recall is not None and LeastRecall.parse(options.min_recall).nprobes is not None:
        raise RequestError(f"min_recall is {options.min_recall!r}, but --suggest finds nprobes itself: leave them out")


def plans(plan: Plan, options: TrainOptions) -> list[Plan]:
    """One plan for each request to try, all of one source."""
    found = []
    for request in candidates(plan.request, plan.summary.count):
        sample_size = sample_size_of(options, request, plan.summary.count)
        found.append(replace(plan, request=request, sample_size=sample_size, gate=Gate()))
    return reading_once(found)


def build(sample: beam.PCollection[Sample], tried: Sequence[Plan], options: TrainOptions, folder: str) -> None:
    """Adds the trials to a pipeline; their results arrive as files under `folder`."""
    for number, plan in enumerate(tried, 1):
        transform = plan.train_model(options.training_threads)
        path = _path(folder, number)
        _ = (
            sample
            | f"Take sample {number}" >> beam.Map(Sample.first, plan.rows_wanted).with_output_types(Sample)
            | f"Try {number}" >> beam.Map(_try, transform, path).with_resource_hints(**plan.resource_hints)
        )


def _path(folder: str, number: int) -> str:
    return join(folder, f"trial-{number}.json")


def _try(sample: Sample, transform: TrainModel, path: str) -> None:
    model = train_model(sample, transform)
    seconds = model.provenance.get("seconds", {}).get("train", 0.0)
    found = {"quality": model.quality, "seconds": seconds, "error": model.error}
    write_whole(path, json.dumps(found).encode())


def read(folder: str, tried: Sequence[Plan]) -> list[Trial]:
    """What came of the trials."""
    return [
        Trial(plan.request, **json.loads(read_whole(_path(folder, number)))) for number, plan in enumerate(tried, 1)
    ]


def tell(trials: Sequence[Trial], plan: Plan, options: TrainOptions) -> Mapping[str, Any]:
    """Prints the trials as a table to stderr and the best request to stdout.

    The table has compression_level, bytes a vector, the fewest nprobes that serve and the recall to expect with them.

    Returns:
      The request.

    Raises:
      TrainingError: none serves.
    """
    least = plan.gate.recall
    names = ("request", "level", "bytes", "nprobes", "@10", "@100", "rescored", "training")
    display.columns(names, [row for trial in trials for row in _rows(trial, plan)], stderr=True)
    chosen = best(trials, least, options.max_bytes_per_vector)
    body = ready(chosen, least)
    print(json.dumps(body, indent=2), flush=True)
    return body


def _rows(trial: Trial, plan: Plan) -> Iterator[tuple[str, ...]]:
    name = trial.request.index_description
    if trial.quality is None:
        yield (name, "", "", "", "", "", "", trial.error)
        return
    row = trial.row(plan.gate.recall)
    shares = [f"{share:.3f}" for share in row["expected"].values()]
    rescored = f"{row['rescored']:.3f}" if "rescored" in row else ""
    yield (
        name,
        trial.request.compression_level or "",
        f"{trial.bytes_per_vector:,.1f}",
        str(row.get("nprobes", "")),
        *(*shares, "")[:2],
        rescored,
        f"{trial.seconds:.1f} s",
    )
