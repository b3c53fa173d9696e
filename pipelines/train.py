# SPDX-License-Identifier: Apache-2.0
"""`knn-train`: reads vectors, samples them, trains a model and writes it where it was asked to.

knn-train --request request.json --parquet 'exports/*.parquet' --model_dir models
knn-train --request request.json --opensearch_url https://localhost:9200 --model_dir models
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, StandardOptions

from pipelines import display
from pipelines.options import TrainOptions, parse, print_help
from pipelines.plan import HELD_OUT, Plan, make_plan
from transforms import progress, run_folder, trainer_process
from transforms.errors import RequestError, TrainingError
from transforms.model import CREATED, FAILED, TRAINING, TrainedModel, metadata
from transforms.model_files import REJECTED, ModelFiles, WriteToModelFiles, write_rejected
from transforms.reading import ReadVectors, too_many_bad_vectors
from transforms.sampling import Sample, SampleVectors
from transforms.training import TrainModel
from transforms.vectors import RejectedVector

#: Runs in this process and starts no server. Beam's own default first tries to download another runner.
LOCAL_RUNNER = "FnApiRunner"


def run(argv: Sequence[str] | None = None) -> Mapping[str, Any] | None:
    """Runs `knn-train`.

    Returns:
      The description of the created model (`model.json`), or None after `--dry_run`.

    Raises:
      RequestError: the request is wrong; nothing was done.
      TrainingError: the run failed; the model says so too, in state `failed`.
    """
    options, dry_run = parse(sys.argv[1:] if argv is None else argv)
    if not options.model_dir and not dry_run:
        raise RequestError("say where the model goes: --model_dir FOLDER")
    plan = make_plan(options)
    for warning in plan.warnings:
        display.say(f"warning: {warning}")
    if dry_run:
        display.table(plan.rows())
        return None
    files = ModelFiles(options.model_dir)
    files.claim(plan.model_id, _described(plan, TRAINING), options.overwrite)
    print(json.dumps({"model_id": plan.model_id}), flush=True)
    display.say(f"sample: {plan.sample_size:,} of {plan.summary.count:,} vectors ({plan.sample_reason()})")
    display.say(f"reading {plan.summary.name} ({plan.summary.reader})")
    return _train(plan, options, files)


def _train(plan: Plan, options: TrainOptions, files: ModelFiles) -> Mapping[str, Any]:
    start = time.monotonic()
    temp_location = options.view_as(GoogleCloudOptions).temp_location
    try:
        with _cancel_on_signals(), run_folder.create(temp_location) as folder, display.live(plan.totals()):
            if options.view_as(StandardOptions).runner is None:
                options.view_as(StandardOptions).runner = LOCAL_RUNNER
            with _quiet_beam():
                pipeline = beam.Pipeline(options=options)
                build(pipeline, plan, options, folder)
                result = pipeline.run()
                result.wait_until_finish()
    except BaseException as error:
        reason = _reason(error)
        if files.get(plan.model_id)["state"] == TRAINING:
            files.describe(plan.model_id, _described(plan, FAILED, reason))
        if isinstance(error, (RequestError, TrainingError)) or reason != str(error):
            raise TrainingError(reason) from error
        raise
    model = files.get(plan.model_id)
    if model["state"] != CREATED:
        raise TrainingError(model["error"] or f"the model is in state {model['state']}")
    display.table(_summary(model, files.path(plan.model_id), time.monotonic() - start, _counters(result)))
    return model


def _described(plan: Plan, state: str, error: str = "") -> dict[str, Any]:
    return TrainedModel(plan.model_id, metadata(plan.request, state, error), None, plan.provenance()).json()


def build(pipeline: beam.Pipeline, plan: Plan, options: TrainOptions, folder: str) -> None:
    """Adds the steps of `plan` to `pipeline`; sampled vectors wait under `folder`."""
    read = pipeline | "Read vectors" >> ReadVectors(plan.source, plan.keep, options.max_bad_vectors)
    sample = read.vectors | "Sample vectors" >> SampleVectors(
        plan.sample_size + HELD_OUT, folder, plan.keep, plan.source, options.max_bad_vectors
    )
    if options.max_bad_vectors:
        path = ModelFiles(options.model_dir).path(plan.model_id, REJECTED)
        sample = sample | "Write rejected vectors" >> beam.Map(
            _write_rejected, beam.pvalue.AsList(read.rejected), path, options.max_bad_vectors
        ).with_output_types(Sample)
    models = sample | "Train model" >> TrainModel(
        plan.request, plan.model_id, HELD_OUT, options.training_threads, plan.provenance()
    )
    models | "Write model" >> WriteToModelFiles(options.model_dir)


def _write_rejected(sample: Sample, rejected: Sequence[RejectedVector], path: str, allowed: int) -> Sample:
    ordered = sorted(rejected, key=lambda bad: (bad.source, bad.row))
    if len(ordered) > allowed:
        raise TrainingError(too_many_bad_vectors(len(ordered), allowed, ordered[0]))
    write_rejected(path, [asdict(bad) for bad in ordered])
    return sample


def _summary(model: Mapping[str, Any], path: str, seconds: float, counters: Mapping[str, int]) -> list[tuple[str, str]]:
    told = model["provenance"]
    training = told["seconds"]
    rows = [
        ("model", model["model_id"]),
        ("written to", path),
        ("method", f"{told['index_description']}, {model['space_type']}, dimension {model['dimension']}"),
        ("vectors in source", f"{told['vectors_in_source']:,}"),
        ("trained on", f"{told['vectors_sampled']:,}"),
        ("seconds", f"{seconds:.1f} in all, {training['train']:.1f} training on {told['training_threads']} threads"),
        ("training memory", f"{told['training_peak_memory_bytes'] / 1e6:,.0f} MB at its peak"),
        ("model bytes", f"{told['blob_bytes']:,}"),
        ("sha256", told["blob_sha256"]),
    ]
    for name, label in (
        ("bytes_received", "bytes received"),
        ("requests_retried", "requests retried"),
        ("documents_without_vector", "without a vector"),
        ("vectors_rejected", "bad vectors"),
    ):
        if counters.get(name):
            rows.insert(5, (label, f"{counters[name]:,}"))
    return rows


def _counters(result: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for counter in result.metrics().query()["counters"]:
        # Prism has no `attempted` values, so what it counted as 0 comes as None.
        found[counter.key.metric.name] = found.get(counter.key.metric.name, 0) + (counter.result or 0)
    return found


def _reason(error: BaseException) -> str:
    """The sentence of ours inside whatever the runner has made of it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (RequestError, TrainingError)):
            return re.sub(r" \[while running .*", "", str(cause), flags=re.DOTALL)
        cause = cause.__cause__
    found = re.search(r"(?:RequestError|TrainingError): (.+?)(?: \[while running .*|\\n|\n|$)", str(error))
    return found.group(1) if found else str(error)


@contextmanager
def _cancel_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a local run in order: contexts are closed, the trainer stops and temporary files go."""

    def cancel(number: int, _: Any) -> None:
        progress.cancel()
        trainer_process.kill_children()
        signal.signal(number, signal.default_int_handler)  # a second one does not wait

    try:
        before = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever called us has the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_beam() -> Iterator[None]:
    """Beam logs the traceback of every failure that it also raises; one line is enough."""
    loggers = [logging.getLogger(name) for name in ("apache_beam", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    prism = logging.getLogger("PrismJobServer")  # whose level Beam sets itself when it starts the server
    prism.disabled = True
    try:
        yield
    finally:
        prism.disabled = False
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def main() -> None:
    """The console script: exit code 0 if the model is there, 2 for a bad request, 1 for a failed run."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help()
        return
    # When we exit, Beam warns that it "really destroys" the job servers that it started.
    logging.getLogger("apache_beam.utils.subprocess_server").setLevel(logging.ERROR)
    try:
        run()
    except RequestError as error:
        display.say(f"error: {error}")
        sys.exit(2)
    except (TrainingError, KeyboardInterrupt) as error:
        display.say(f"failed: {error or 'interrupted'}")
        sys.exit(1)


if __name__ == "__main__":
    main()
