# SPDX-License-Identifier: Apache-2.0
"""`Plan`: all that is known of a training before a vector is read. `--dry_run` prints it, `train` builds it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from pipelines.options import TrainOptions, body
from pipelines.pruning import newest
from pipelines.resume import KeptSample, matching
from transforms.comparison import FEWEST_VECTORS, Previous, check_comparable, parse_gain
from transforms.errors import RequestError
from transforms.gate import Gate, LeastRecall
from transforms.memory import training_memory
from transforms.model import TrainedModel, random_model_id
from transforms.model_files import ModelFiles, check_model_id
from transforms.model_ids import expand, is_pattern
from transforms.opensearch import OpenSearchConnection, OpenSearchVectors, Session, model_index
from transforms.opensearch.publishing import Ready, preflight, unfinished
from transforms.opensearch.session import LAUNCHER_ATTEMPTS
from transforms.parquet import ParquetVectors
from transforms.quality import hold_out
from transforms.request import TrainingRequest
from transforms.request_body import read_request
from transforms.sampling import keep_fraction
from transforms.training import TrainModel, available_cores
from transforms.vectors import NUMPY_TYPES, ROW_BYTES, SourceSummary, VectorSource, columns
from transforms.versions import NEWEST_TARGET

#: Rows set aside to try the trained model with where it is not evaluated.
CHECKED = 16

#: Beyond these faiss ends in an overflow, OpenMP without a word.
MOST_ITERATIONS, MOST_THREADS = 10_000, 1_024

#: Memory of a Beam worker that has the libraries loaded and trains in another process: 266 MB where it was measured.
WORKER_BYTES = 300_000_000

# https://cloud.google.com/dataflow/docs/guides/right-fitting
_ACCELERATOR = re.compile(r"type:[^;:]+;count:[1-9]\d*(;[^;]+)*")

#: Below this many vectors a centroid faiss warns that clusters are poor (ClusteringParameters.min_points_per_centroid).
POINTS_PER_CENTROID = 39


@dataclass(frozen=True)
class Plan:
    """What a run will do for one request.

    Attributes:
      request: validated and resolved.
      model_id: given or random.
      source: where the vectors come from, contacted once.
      summary: what the source said.
      slices: how many parts it is read in.
      sample_size: vectors to train on, exactly.
      keep: fraction of the source that readers pass on, with the margin that makes a second reading rarer than 1e-9.
      threads: to train with.
      accelerator: Beam's hint for the worker that trains, None for any worker.
      niter, nredo: iterations and restarts of k-means, None for faiss's own.
      held_out: rows to set aside, beyond the sample, where there are as many.
      evaluate: measure how good the model is with them.
      gate: what it must reach.
      previous: the model to compare with, with its blob.
      least_gain: keep `previous` unless the new model's error is smaller by this share.
      warnings: for the user.
      publication: how the model gets into a cluster, None if it does not.
      kept: the sample of an earlier run, to be used instead of reading.
    """

    request: TrainingRequest
    model_id: str
    source: VectorSource
    summary: SourceSummary
    slices: int
    sample_size: int
    keep: float
    seed: int
    query: Mapping[str, Any] | None
    threads: int
    accelerator: str | None
    niter: int | None
    nredo: int | None
    held_out: int
    evaluate: bool
    gate: Gate
    previous: TrainedModel | None
    least_gain: float | None
    warnings: tuple[str, ...]
    publication: Ready | None
    kept: KeptSample | None = None

    @property
    def rows_wanted(self) -> int:
        """To train on and to set aside."""
        return self.sample_size + self.held_out

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of the training process."""
        return training_memory(self.request, self.sample_size, self.held_out, self.evaluate)

    @property
    def worker_bytes(self) -> int:
        """Estimated peak of the worker that trains, the training process included."""
        return self.memory_bytes + WORKER_BYTES

    @property
    def resource_hints(self) -> dict[str, Any]:
        """Beam's hints for the steps that train and write the model."""
        return {"min_ram": self.worker_bytes, **({"accelerator": self.accelerator} if self.accelerator else {})}

    @property
    def read_bytes(self) -> float:
        """Estimated bytes to read from the source."""
        if self.kept is not None:
            return 0.0
        thinned_at_source = isinstance(self.source, OpenSearchVectors)
        return self.summary.count * self.summary.row_bytes * (self.keep if thinned_at_source else 1.0)

    @property
    def spill_bytes(self) -> int:
        """Bytes under the temporary folder."""
        values = columns(self.request.dimension, self.request.data_type)
        row = values * NUMPY_TYPES[self.request.data_type].itemsize + ROW_BYTES
        return int(min(self.summary.count, self.keep * self.summary.count + 1) * row)

    def train_model(self, threads: int, previous: Previous | None = None) -> TrainModel:
        """The step that trains the model on its sample, with `threads` or all cores of the worker (0)."""
        return TrainModel(
            self.request,
            self.model_id,
            self.held_out,
            threads,
            self.niter,
            self.nredo,
            self.provenance(),
            self.summary.count if self.evaluate else 0,
            self.gate,
            previous,
        )

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (what, how much), for people."""
        request, summary = self.request, self.summary
        rows = [
            ("model id", self.model_id),
            ("source", f"{summary.name} ({summary.reader})"),
            ("vectors", f"{summary.count:,} x {request.dimension} {request.data_type}"),
            ("slices", f"{self.slices:,}" if self.kept is None else f"none: resuming with {self.kept.folder}"),
            ("sample", f"{self.sample_size:,} vectors, seed {self.seed}; {self.sample_reason()}"),
            ("to read", f"{_bytes(self.read_bytes)}, passing on {self.keep:.3g} of the vectors"),
            ("temporary files", _bytes(self.spill_bytes)),
            ("method", f"{request.index_description}, {request.space_type}"),
            ("training", f"{_bytes(self.memory_bytes)} of memory, {self.threads} threads"),
            *([("accelerator", self.accelerator)] if self.accelerator else []),
            *((name, str(value)) for name, value in (("niter", self.niter), ("nredo", self.nredo)) if value),
            ("model", _bytes(request.blob_bytes)),
            ("for", f"OpenSearch {request.target_version}"),
        ]
        if self.evaluate:
            rows.insert(-1, ("evaluation", self._evaluation()))
        return rows if self.publication is None else [*rows, ("publish", self.publication.choice.explanation)]

    def _evaluation(self) -> str:
        left = min(self.held_out, self.summary.count - self.sample_size)
        parts = [f"{left:,} vectors held out" if left else "on vectors that were trained on: there are no others"]
        parts += [f"compared with {self.previous.model_id}"] if self.previous else []
        return "; ".join([*parts, *self.gate.bars()])

    def sample_reason(self) -> str:
        """Why the sample has its size."""
        request = self.request
        if self.sample_size == self.summary.count:
            return "all there are"
        if self.sample_size == request.max_training_vector_count:
            return "max_training_vector_count"
        return "256 a centroid, which is all that faiss uses"

    def provenance(self) -> Mapping[str, Any]:
        """What to remember of this with the model."""
        return {
            "source": self.summary.name,
            "reader": self.summary.reader,
            "vectors_in_source": self.summary.count,
            "sample_size": self.sample_size,
            "seed": self.seed,
            "query": self.query,
            "kept_fraction": self.keep,
            "index_description": self.request.index_description,
            "niter": self.niter,
            "nredo": self.nredo,
            "resumed": self.kept is not None,
        }


def make_plans(options: TrainOptions, kept: Sequence[KeptSample] = ()) -> list[Plan]:
    """A plan for each request. Validates them all, then contacts the sources, and the cluster to publish to.

    With `--resume`, what is known of the vectors comes from one of the `kept` samples, where there is one.

    Requests for the same vectors share one source: it is read once, and the sample of each is the beginning of the
    largest. So the model of a request is the same, whatever is trained beside it.

    Raises:
      RequestError: a request or a flag is wrong, or the source does not fit; nothing was written.
      TrainingError: the cluster cannot be reached.
    """
    for name in ("niter", "nredo"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= MOST_ITERATIONS:
            raise RequestError(f"{name} is {value}, expected 1 to {MOST_ITERATIONS}")
    for name in ("max_bad_vectors", "training_threads", "slices", "eval_vectors"):
        if getattr(options, name) < 0:
            raise RequestError(f"{name} is {getattr(options, name)}, but must be 0 or more")
    if options.training_threads > MOST_THREADS:
        raise RequestError(f"training_threads is {options.training_threads}, but at most {MOST_THREADS} can be started")
    if options.max_bytes_per_vector is not None and not options.suggest:
        raise RequestError("--max_bytes_per_vector is for --suggest to choose by; a request says itself what it takes")
    if options.accelerator is not None and not _ACCELERATOR.fullmatch(options.accelerator):
        raise RequestError(
            f"accelerator is {options.accelerator!r}, expected a type and a count, as "
            "'type:nvidia-tesla-t4;count:1;install-nvidia-driver'"
        )
    if options.publish and not options.model_dir:
        raise RequestError("--publish needs --model_dir too: what cannot be published must not be lost")
    connection = connect(options) if options.publish or not options.parquet else None
    with Session(connection, LAUNCHER_ATTEMPTS) if connection and options.publish else nullcontext() as session:
        version = options.target_version or (model_index.cluster_version(session) if session else NEWEST_TARGET)
        requests = [_request(options, *each, version) for each in _named(options)]
        limits = [request.check_limits(options.allow_large_model) for request in requests]
        for request in requests:
            if options.accelerator is not None and (request.nlist is None or request.is_binary):
                raise RequestError(
                    f"accelerator is {options.accelerator!r}, but {request.index_description} has no use for one: only "
                    "the centroids of ivf on float or byte vectors have"
                )
        ids = [_model_id(options, request) for request in requests]
        if len(set(ids)) < len(ids):
            raise RequestError(f"model_id {', '.join(ids)}: each model needs an id of its own")
        gate, gain = _bars(options, requests)
        previous = _previous(options, session, connection, requests)
        publications: list[Ready | None] = [None] * len(requests)
        if session:
            publications = [
                preflight(session, model_id, request, options.publish, True, options.allow_large_model)
                for model_id, request in zip(ids, requests, strict=True)
            ]
    sources: list[VectorSource] = []
    for request in requests:
        wanted = _source(options, request, connection)
        sources.append(next((known for known in sources if known == wanted), wanted))
    samples = matching(kept, sources) if options.resume else [None] * len(sources)
    each = zip(requests, ids, sources, limits, publications, samples, strict=True)
    plans = [_plan(options, *of_request) for of_request in each]
    return reading_once([replace(plan, gate=gate, previous=previous, least_gain=gain) for plan in plans])


def _bars(options: TrainOptions, requests: Sequence[TrainingRequest]) -> tuple[Gate, float | None]:
    """What models must reach, and by how much they must be better than the one before."""
    recall = None if options.min_recall is None else LeastRecall.parse(options.min_recall)
    gate = Gate(recall, options.max_imbalance)
    gain = None if options.only_if_better is None else parse_gain(options.only_if_better)
    if gain is not None and options.compare_to is None:
        raise RequestError("--only_if_better needs --compare_to MODEL_ID: better than what?")
    if not options.eval_vectors and (gate or options.compare_to is not None):
        raise RequestError("eval_vectors is 0, but --min_recall, --max_imbalance and --compare_to need some to measure")
    for request in requests:
        gate.check(request)
    return gate, gain


def _previous(
    options: TrainOptions,
    session: Session | None,
    connection: OpenSearchConnection | None,
    requests: Sequence[TrainingRequest],
) -> TrainedModel | None:
    """The model to compare with: from the files if it is there, or else from the cluster of this run."""
    if options.compare_to is None:
        return None
    pattern = is_pattern(options.compare_to)
    model_id = _newest(options, session) if pattern else check_model_id(options.compare_to)
    if model_id is None:
        return None
    try:
        if not options.model_dir:
            raise RequestError(f'Model "{model_id}" is nowhere: there is no --model_dir')
        model = ModelFiles(options.model_dir).fetch(model_id)
    except RequestError as missing:
        if connection is None:
            raise RequestError(f"compare_to: {missing}") from None
        with nullcontext(session) if session else Session(connection, LAUNCHER_ATTEMPTS) as open_session:
            model = model_index.fetch(open_session, model_id)
    for request in requests:
        check_comparable(model.json(), request)
    return model


def _newest(options: TrainOptions, session: Session | None) -> str | None:
    """The newest model of a pattern: in the cluster to publish to, or else in the files; None for a first run."""
    if session is None:
        return newest(ModelFiles(options.model_dir).list() if options.model_dir else [], options.compare_to)
    begun = unfinished(session)
    models = [model for model in model_index.list_models(session) if model["model_id"] not in begun]
    return newest(models, options.compare_to)


def _plan(
    options: TrainOptions,
    request: TrainingRequest,
    model_id: str,
    source: VectorSource,
    limits: Sequence[str],
    publication: Ready | None,
    kept: KeptSample | None,
) -> Plan:
    warnings = tuple(limits)
    summary = source.summary() if kept is None else kept.summary
    # The cluster's own minimum is about all documents of the index; a query's share of them says nothing of it.
    request.check_count(summary.count, documents=None if options.query else summary.documents)
    sample_size = sample_size_of(options, request, summary.count)
    held_out = hold_out(options.eval_vectors) or CHECKED
    if kept is not None and kept.sample.size < min(sample_size + held_out, summary.count):
        raise RequestError(f"the sample in {kept.folder} is too small to --resume with: {sample_size:,} are wanted")
    enough = POINTS_PER_CENTROID * request.minimum_vectors
    if sample_size < enough:
        warnings += (
            f"{sample_size:,} vectors are few for {request.minimum_vectors:,} centroids: below {enough:,} "
            f"({POINTS_PER_CENTROID} a centroid) recall suffers",
        )
    left = summary.count - sample_size
    if options.compare_to is not None and left < FEWEST_VECTORS:
        raise RequestError(
            f"compare_to needs {FEWEST_VECTORS} vectors or more that are not trained on, but {left} of {summary.count} "
            "are left: lower max_training_vector_count"
        )
    if publication is not None:
        warnings += tuple(warning for warning in publication.warnings if warning not in warnings)
    return Plan(
        request=request,
        model_id=model_id,
        source=source,
        summary=summary,
        slices=len(source.slices()) if kept is None else 0,
        sample_size=sample_size,
        keep=1.0,
        seed=options.seed,
        query=options.query,
        threads=options.training_threads or available_cores(),
        accelerator=options.accelerator,
        niter=options.niter,
        nredo=options.nredo,
        held_out=held_out,
        evaluate=options.eval_vectors > 0,
        gate=Gate(),
        previous=None,
        least_gain=None,
        warnings=warnings,
        publication=publication,
        kept=kept,
    )


def sample_size_of(options: TrainOptions, request: TrainingRequest, count: int) -> int:
    """Vectors to train on, of `count`."""
    usable = count if options.use_all_vectors else request.usable_vectors
    return min(request.max_training_vector_count, usable, count)


def by_source(plans: Sequence[Plan]) -> list[list[Plan]]:
    """The plans that share a source, together."""
    groups: dict[int, list[Plan]] = {}
    for plan in plans:
        groups.setdefault(id(plan.source), []).append(plan)
    return list(groups.values())


def reading_once(plans: Sequence[Plan]) -> list[Plan]:
    """The plans, in their order, with what readers must pass on for the largest sample of each source."""
    keep = {}
    for together in by_source(plans):
        largest = max(plan.rows_wanted for plan in together)
        keep[id(together[0].source)] = keep_fraction(largest, together[0].summary.count)
    return [replace(plan, keep=keep[id(plan.source)]) for plan in plans]


def _named(options: TrainOptions) -> list[tuple[str | None, str | None]]:
    """(file, model id) of each request; one without a file is all in the flags."""
    files, ids = options.request or [None], options.model_id or []
    if ids and len(ids) != len(files):
        raise RequestError(
            f"there are {len(files)} requests and {len(ids)} model ids: give each --request a --model_id"
        )
    return list(zip(files, ids or [None] * len(files), strict=True))


def _request(options: TrainOptions, file: str | None, model_id: str | None, version: str) -> TrainingRequest:
    try:
        return TrainingRequest.parse(
            body(options, None if file is None else read_request(file)),
            model_id=model_id,
            preference=options.preference,
            node_id=options.node_id,
            target_version=version,
            require_index=not options.parquet,
            require_field=not (options.parquet and options.vector_column),
        )
    except RequestError as error:
        if len(options.request or ()) < 2:
            raise
        raise RequestError(f"{file}: {error}") from None


def _model_id(options: TrainOptions, request: TrainingRequest) -> str:
    if request.model_id is None:
        return random_model_id()
    question = {
        "request": request.body(),
        "target_version": request.target_version,
        "parquet": options.parquet,
        "vector_column": options.vector_column,
        "query": options.query,
        "seed": options.seed,
        "use_all_vectors": options.use_all_vectors,
        "niter": options.niter,
        "nredo": options.nredo,
    }
    return check_model_id(expand(request.model_id, datetime.now(timezone.utc), question))


def connect(options: TrainOptions) -> OpenSearchConnection:
    """The cluster that is read from or published to."""
    return OpenSearchConnection.from_env(url=options.opensearch_url or None)


def _source(options: TrainOptions, request: TrainingRequest, connection: OpenSearchConnection | None) -> VectorSource:
    if options.parquet and options.opensearch_url and not options.publish:
        raise RequestError("give --parquet or --opensearch_url, not both, unless you --publish")
    if options.parquet:
        if options.query is not None:
            raise RequestError("--query selects documents of an index; it does not go with --parquet")
        return ParquetVectors(
            options.parquet,
            options.vector_column or request.training_field,
            request.dimension,
            request.data_type,
            options.seed,
        )
    assert connection is not None  # `make_plans` connects wherever there is no --parquet
    return OpenSearchVectors(
        connection,
        request.training_index or "",
        request.training_field,
        request.dimension,
        request.data_type,
        query=options.query,
        seed=options.seed,
        search_size=request.search_size,
        reader=options.reader,
        slices_wanted=options.slices,
        max_requests_in_flight=options.max_requests_in_flight,
    )


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
