# SPDX-License-Identifier: Apache-2.0
"""`knn-train`: reads vectors, samples them, trains models and writes them where it was asked to.

knn-train --request request.json --parquet 'exports/*.parquet' --model_dir models
knn-train --request request.json --opensearch_url https://localhost:9200 --model_dir models --publish auto
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TextIO

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import GoogleCloudOptions, StandardOptions
from apache_beam.runners.runner import PipelineResult

from pipelines import display, outcome, remote, resume, suggest
from pipelines.options import TrainOptions, parse, print_help
from pipelines.plan import Plan, by_source, connect, make_plans
from transforms import progress, run_folder, trainer_process
from transforms.errors import RequestError, TrainingError
from transforms.files import check as check_path
from transforms.model import CREATED, FAILED, TRAINING, TrainedModel, metadata
from transforms.model_files import REJECTED, ModelFiles, WriteToModelFiles, WrittenModel, write_rejected
from transforms.opensearch.routes import DELEGATE
from transforms.opensearch.writing import WriteToModelIndex, WriteToModelIndexResult
from transforms.reading import METRICS, ReadVectors, too_many_bad_vectors
from transforms.run_folder import RunFolder
from transforms.sampling import FillSample, Sample, SampleVectors
from transforms.vectors import RejectedVector

#: Runs in this process and starts no server. Beam's own default first tries to download another runner.
LOCAL_RUNNER = "FnApiRunner"


def run(argv: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
    """Runs `knn-train`.

    Returns:
      The descriptions of the created models (`model.json`), one for each request; none after `--dry_run` or where the
      model of `--compare_to` was kept. After `--suggest` it is the request.

    Raises:
      RequestError: a request is wrong; nothing was done.
      TrainingError: a training or a publication failed; the models say so too, in state `failed`. What did not fail is
        there all the same.
    """
    options, dry_run = parse(sys.argv[1:] if argv is None else argv)
    FileSystems.set_options(options)  # files are looked at before there is a pipeline
    if options.suggest:
        suggest.check(options)
    elif not options.model_dir and not dry_run:
        raise RequestError("say where the model goes: --model_dir FOLDER")
    remote.check(options)
    for path in filter(None, (options.model_dir, options.parquet)):
        check_path(path)
    temp_location = options.view_as(GoogleCloudOptions).temp_location
    run_folder.check(temp_location)
    kept = resume.find(temp_location)
    plans = make_plans(options, kept)
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        display.say(f"warning: {warning}")
    if dry_run:
        for number, plan in enumerate(plans):
            print("\n" * bool(number), end="")
            display.table(plan.rows())
        return []
    if options.suggest:
        return _suggest(plans[0], options)
    files = ModelFiles(options.model_dir)
    before = _claim(files, plans, options.overwrite)
    if not options.resume:  # of what is read now, no older sample need be kept
        sources = [resume.identity(plan.source) for plan in plans]
        for folder in {sample.folder for sample in kept if sample.source in sources}:
            run_folder.discard(folder)
    for plan in plans:
        print(json.dumps({"model_id": plan.model_id}), flush=True)
        display.say(f"sample: {plan.sample_size:,} of {plan.summary.count:,} vectors ({plan.sample_reason()})")
    for plan, *_ in by_source(plans):
        verb = "reading" if plan.kept is None else f"resuming with what {plan.kept.folder} has of"
        display.say(f"{verb} {plan.summary.name} ({plan.summary.reader})")
    return _train(plans, options, files, before)


def _claim(files: ModelFiles, plans: Sequence[Plan], overwrite: bool) -> dict[str, Mapping[str, Any]]:
    """Makes all models exist, or none. Returns the descriptions of those that are there already, to be overwritten."""
    claimed: list[str] = []
    left: dict[str, Mapping[str, Any]] = {}
    try:
        for plan in plans:
            resumed = plan.kept is not None and plan.model_id in plan.kept.model_ids
            unfinished = resumed and files.state(plan.model_id) in (TRAINING, FAILED)
            if files.claim(plan.model_id, _described(plan, TRAINING), overwrite or unfinished):
                claimed.append(plan.model_id)
            else:
                left[plan.model_id] = files.get(plan.model_id)
        return left
    except RequestError:
        for model_id in claimed:
            files.remove(model_id)
        raise


def _train(
    plans: Sequence[Plan], options: TrainOptions, files: ModelFiles, before: Mapping[str, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    start = time.monotonic()
    elsewhere = remote.is_remote(options)  # asked now: Beam takes the runner out of the options when it submits
    folder = None
    # The launcher of a Dataflow flex template hands the job over and must end: nothing of it is to be waited for.
    launches = options.view_as(GoogleCloudOptions).template_location is not None
    try:
        with _cancel_on_signals(elsewhere), _folder(plans, options) as folder, display.live(_totals(plans)):
            failed = True
            try:
                result = _run(options, partial(build, plans=plans, options=options, folder=folder.path), not launches)
                outcomes = [] if launches else [outcome.read(folder.path, plan) for plan in plans]
                failed = any(each.written["state"] != CREATED and not each.written["kept"] for each in outcomes)
            finally:
                folder.goes_on = launches
                folder.keep = failed and not launches and not progress.cancelled() and resume.has_sample(folder.path)
    except BaseException as error:
        reason = _reason(error, elsewhere)
        for plan in plans:
            if files.state(plan.model_id) == TRAINING:
                files.describe(plan.model_id, _described(plan, FAILED, reason))
        outcome.tell_states(plans, files, before, FAILED, reason)
        if _is_told(error, reason, elsewhere):
            raise TrainingError(reason) from error
        raise
    finally:
        if folder is not None and folder.keep:
            display.say(f"the sample is kept in {folder.path}: the same command with --resume trains on it")
    if launches:
        outcome.tell_states(plans, files, before, TRAINING)
        return []
    return outcome.tell(plans, outcomes, files, time.monotonic() - start, outcome.counters(result))


def _folder(plans: Sequence[Plan], options: TrainOptions) -> AbstractContextManager[RunFolder]:
    """The run's folder: a new one, or that of the run whose sample is used again."""
    kept = next((plan.kept for plan in plans if plan.kept is not None), None)
    if kept is not None:
        return run_folder.reopen(kept.folder)
    return run_folder.create(options.view_as(GoogleCloudOptions).temp_location)


def _run(options: TrainOptions, build: Callable[[beam.Pipeline], None], wait: bool = True) -> PipelineResult:
    """Builds a pipeline and runs it, to its end if `wait`."""
    elsewhere = remote.is_remote(options)
    if options.view_as(StandardOptions).runner is None:
        options.view_as(StandardOptions).runner = LOCAL_RUNNER
    with _quiet_beam():
        pipeline = beam.Pipeline(options=options)
        build(pipeline)
        result = pipeline.run()
        if wait:
            with _cancel_on_signals(elsewhere):  # again: the job servers that Beam starts put themselves in between
                remote.wait(result)
    return result


def _suggest(plan: Plan, options: TrainOptions) -> list[Mapping[str, Any]]:
    tried = suggest.plans(plan, options)
    display.say(f"trying {', '.join(each.request.index_description for each in tried)}")

    def build(pipeline: beam.Pipeline) -> None:
        suggest.build(_sample(pipeline, tried, options, folder.path, ""), tried, options, folder.path)

    elsewhere = remote.is_remote(options)
    try:
        with _cancel_on_signals(elsewhere), _folder(tried, options) as folder, display.live(_totals(tried)):
            _run(options, build)
            trials = suggest.read(folder.path, tried)
    except BaseException as error:
        reason = _reason(error, elsewhere)
        if _is_told(error, reason, elsewhere):
            raise TrainingError(reason) from error
        raise
    return [suggest.tell(trials, plan, options)]


def _described(plan: Plan, state: str, error: str = "") -> dict[str, Any]:
    return TrainedModel(plan.model_id, metadata(plan.request, state, error), None, plan.provenance()).json()


def _totals(plans: Sequence[Plan]) -> dict[str, int]:
    """How much there is of what readers count as they go."""
    read = [together[0] for together in by_source(plans)]
    return {
        "slices": sum(plan.slices for plan in read),
        "read": sum(round(plan.keep * plan.summary.count) for plan in read),
    }


# --- the pipeline --------------------------------------------------------------------------------------------------


def build(pipeline: beam.Pipeline, plans: Sequence[Plan], options: TrainOptions, folder: str) -> None:
    """Adds the steps of `plans` to `pipeline`; sampled vectors wait under `folder`, and the outcomes arrive there."""
    sources = by_source(plans)
    for number, together in enumerate(sources, 1):
        sample = _sample(pipeline, together, options, folder, f" {number}" if len(sources) > 1 else "")
        for plan in together:
            _model(sample, plan, options, folder, f" {plans.index(plan) + 1}" if len(plans) > 1 else "")


def _sample(
    pipeline: beam.Pipeline, plans: Sequence[Plan], options: TrainOptions, folder: str, suffix: str
) -> beam.PCollection[Sample]:
    """The sample of one source, as large as the largest that is wanted of it."""
    plan = max(plans, key=lambda plan: plan.rows_wanted)
    if plan.kept is not None:
        return pipeline | f"Resume{suffix}" >> beam.Create([plan.kept.sample])
    read = pipeline | f"Read vectors{suffix}" >> ReadVectors(plan.source, plan.keep, options.max_bad_vectors)
    sample = read.vectors | f"Sample vectors{suffix}" >> SampleVectors(plan.rows_wanted, folder)
    rejected = read.rejected
    if plan.keep < 1:
        filled = sample | f"Fill sample{suffix}" >> FillSample(plan.source, folder, options.max_bad_vectors)
        sample = filled.sample
        rejected = (rejected, filled.rejected) | f"All rejected{suffix}" >> beam.Flatten()
    if options.max_bad_vectors:
        files = ModelFiles(options.model_dir)
        paths = [] if options.suggest else [files.path(plan.model_id, REJECTED) for plan in plans]
        sample = sample | f"Write rejected vectors{suffix}" >> beam.Map(
            _write_rejected, beam.pvalue.AsList(rejected), paths, options.max_bad_vectors
        ).with_output_types(Sample)
    ids = [plan.model_id for plan in plans]
    return sample | f"Note sample{suffix}" >> beam.Map(
        resume.note, resume.note_path(folder, suffix.strip() or "1"), resume.identity(plan.source), plan.summary, ids
    ).with_output_types(Sample)


def _model(sample: beam.PCollection[Sample], plan: Plan, options: TrainOptions, folder: str, suffix: str) -> None:
    """One model of a sample: trained, written to files, and from there into a cluster."""
    own = sample | f"Take sample{suffix}" >> beam.Map(Sample.first, plan.rows_wanted).with_output_types(Sample)
    train = plan.train_model(options.training_threads, outcome.hand_over_previous(folder, plan))
    write = WriteToModelFiles(options.model_dir)
    # Both have the hints: runners fuse only steps with equal ones, and a model is too large to be sent as an element.
    models = own | f"Train model{suffix}" >> train.with_resource_hints(**plan.resource_hints)
    written = models | f"Write model{suffix}" >> write.with_resource_hints(**plan.resource_hints)
    _ = written | f"Report model{suffix}" >> beam.Map(
        outcome.report, outcome.report_path(folder, plan, outcome.WRITTEN)
    )
    if plan.publication is None:
        return
    # From the files: whatever becomes of the publication, the model is there, and a bundle done again finds the same.
    files = ModelFiles(options.model_dir)
    vectors = None
    # Only where it is needed: a side input ends a stage, and the model would travel as an element.
    if plan.publication.choice.route == DELEGATE:
        vectors = own | f"Leave out held-out{suffix}" >> beam.Map(Sample.first, plan.sample_size).with_output_types(
            Sample
        )
    published = (
        written
        | f"Read model{suffix}" >> beam.FlatMap(_read_created, files).with_output_types(TrainedModel)
        | f"Publish model{suffix}"
        >> WriteToModelIndex(
            connect(options),
            plan.request,
            options.publish,
            vectors,
            plan.request.preference,
            options.verify,
            options.allow_large_model,
        )
    )
    path = outcome.report_path(folder, plan, outcome.PUBLISHED)
    _ = (
        published
        | f"Note publication{suffix}" >> beam.Map(_note_publication, files)
        | f"Report publication{suffix}" >> beam.Map(outcome.report, path)
    )


def _write_rejected(sample: Sample, rejected: Sequence[RejectedVector], paths: Sequence[str], allowed: int) -> Sample:
    ordered = sorted(set(rejected), key=lambda bad: (bad.source, bad.row))  # what was read again comes twice
    if len(ordered) > allowed:
        raise TrainingError(too_many_bad_vectors(len(ordered), allowed, ordered[0]))
    Metrics.counter(METRICS, "vectors_rejected").inc(len(ordered))
    for path in paths:
        write_rejected(path, [asdict(bad) for bad in ordered])
    return sample


def _read_created(written: WrittenModel, files: ModelFiles) -> Iterator[TrainedModel]:
    if written.state == CREATED:
        yield files.fetch(written.model_id)


def _note_publication(result: WriteToModelIndexResult, files: ModelFiles) -> WriteToModelIndexResult:
    """Says in the model's own description where it was published, or why it was not."""
    description = files.get(result.model_id)
    told = {name: value for name, value in asdict(result).items() if name != "model_id"}
    description["provenance"]["publication"] = told
    files.describe(result.model_id, description)
    return result


def _is_told(error: BaseException, reason: str, elsewhere: bool) -> bool:
    """Whether `reason` says all that users need; anything else is a bug and needs its traceback."""
    return elsewhere or isinstance(error, (RequestError, TrainingError)) or reason != str(error)


def _reason(error: BaseException, elsewhere: bool = False) -> str:
    """The sentence of ours inside whatever the runner has made of it."""
    found = _sentence(error)
    return remote.reason(found) if elsewhere else found


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (RequestError, TrainingError)):
            return re.sub(r" \[while running .*", "", str(cause), flags=re.DOTALL)
        cause = cause.__cause__
    found = re.search(r"(?:Request|Training|Storage)Error: (.+?)(?: \[while running .*|\\n|\n|$)", str(error))
    return found.group(1) if found else str(error)


@contextmanager
def _cancel_on_signals(elsewhere: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run in order: contexts are closed, the trainer stops and temporary files go.

    Steps in this process are told to stop; where they run elsewhere, waiting for them ends with KeyboardInterrupt.
    """

    def cancel(number: int, _: Any) -> None:
        progress.cancel()
        trainer_process.kill_children()
        signal.signal(number, signal.default_int_handler)  # a second one does not wait
        if elsewhere:
            raise KeyboardInterrupt

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


class _WithoutTracebacks:
    """A text stream that leaves out tracebacks, where each comes as one text."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._left_out = False

    def write(self, text: str) -> int:
        self._left_out = text.startswith("Traceback (most recent call last):") or (self._left_out and text == "\n")
        return len(text) if self._left_out else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _quiet_beam() -> Iterator[None]:
    """Beam logs, and its workers in this process print, the traceback of every failure that it also raises; one line
    is enough.
    """
    stderr = sys.stderr
    loggers = [logging.getLogger(name) for name in ("apache_beam", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    prism = logging.getLogger("PrismJobServer")  # whose level Beam sets itself when it starts the server
    prism.disabled = True
    sys.stderr = _WithoutTracebacks(stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = stderr
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
    # Its workers in this process log how they are torn down, at any time after the run.
    logging.getLogger("apache_beam.runners.worker").setLevel(logging.CRITICAL)
    try:
        run()
    except RequestError as error:
        display.say(f"error: {error}")
        sys.exit(2)
    except (TrainingError, KeyboardInterrupt) as error:
        display.say(f"failed: {error or 'interrupted'}")
        # Threads of Beam's that have not ended yet would print how they are torn down.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process is gone
        sys.exit(1)


if __name__ == "__main__":
    main()
