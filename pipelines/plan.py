# SPDX-License-Identifier: Apache-2.0
"""`Plan`: all that is known of a run before a vector is read. `--dry_run` prints it, `pipelines.train` builds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.options import TrainOptions, body
from transforms import faiss_training
from transforms.errors import RequestError
from transforms.files import read_whole
from transforms.model import random_model_id
from transforms.model_files import check_model_id
from transforms.opensearch import OpenSearchConnection, OpenSearchVectors
from transforms.parquet import ParquetVectors
from transforms.request import TrainingRequest
from transforms.sampling import keep_fraction
from transforms.training import available_cores
from transforms.vectors import NUMPY_TYPES, SourceSummary, VectorSource, columns

#: Rows set aside to try the trained model with.
HELD_OUT = 16

#: Below this many vectors a centroid faiss warns that clusters are poor (ClusteringParameters.min_points_per_centroid).
POINTS_PER_CENTROID = 39


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
      request: validated and resolved.
      model_id: given or random.
      source: where the vectors come from, contacted once.
      summary: what the source said.
      slices: how many parts it is read in.
      sample_size: vectors to train on, exactly.
      keep: fraction of the source that readers pass on, with the margin that makes a second reading rarer than 1e-9.
      threads: to train with.
      warnings: for the user.
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
    warnings: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of the training process."""
        return faiss_training.estimate_memory(self.request, self.sample_size)

    @property
    def read_bytes(self) -> float:
        """Estimated bytes to read from the source."""
        thinned_at_source = isinstance(self.source, OpenSearchVectors)
        return self.summary.count * self.summary.row_bytes * (self.keep if thinned_at_source else 1.0)

    @property
    def spill_bytes(self) -> int:
        """Bytes under the temporary folder."""
        row = columns(self.request.dimension, self.request.data_type) * NUMPY_TYPES[self.request.data_type].itemsize + 8
        return int(min(self.summary.count, self.keep * self.summary.count + 1) * row)

    def totals(self) -> dict[str, int]:
        """How much there is of what readers count as they go."""
        return {"slices": self.slices, "read": round(self.keep * self.summary.count)}

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (what, how much), for people."""
        request, summary = self.request, self.summary
        return [
            ("model id", self.model_id),
            ("source", f"{summary.name} ({summary.reader})"),
            ("vectors", f"{summary.count:,} x {request.dimension} {request.data_type}"),
            ("slices", f"{self.slices:,}"),
            ("sample", f"{self.sample_size:,} vectors, seed {self.seed}; {self.sample_reason()}"),
            ("to read", f"{_bytes(self.read_bytes)}, passing on {self.keep:.3g} of the vectors"),
            ("temporary files", _bytes(self.spill_bytes)),
            ("method", f"{request.index_description}, {request.space_type}"),
            ("training", f"{_bytes(self.memory_bytes)} of memory, {self.threads} threads"),
            ("model", _bytes(request.blob_bytes)),
            ("for", f"OpenSearch {request.target_version}"),
        ]

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
        }


def make_plan(options: TrainOptions) -> Plan:
    """Validates the request, then contacts the source.

    Raises:
      RequestError: the request or a flag is wrong, or the source does not fit; nothing was written.
    """
    request = _request(options)
    warnings = request.check_limits(options.allow_large_model)
    if options.max_bad_vectors < 0 or options.training_threads < 0 or options.slices < 0:
        raise RequestError("max_bad_vectors, training_threads and slices must be 0 or more")
    model_id = check_model_id(request.model_id or random_model_id())
    source = _source(options, request)
    summary = source.summary()
    # The cluster's own minimum is about all documents of the index; a query's share of them says nothing of it.
    request.check_count(summary.count, documents=None if options.query else summary.documents)
    limit = request.max_training_vector_count
    if not options.use_all_vectors:
        limit = min(limit, request.usable_vectors)
    sample_size = min(limit, summary.count)
    enough = POINTS_PER_CENTROID * request.minimum_vectors
    if sample_size < enough:
        warnings.append(
            f"{sample_size:,} vectors are few for {request.minimum_vectors:,} centroids: below {enough:,} "
            f"({POINTS_PER_CENTROID} a centroid) recall suffers"
        )
    return Plan(
        request=request,
        model_id=model_id,
        source=source,
        summary=summary,
        slices=len(source.slices()),
        sample_size=sample_size,
        keep=keep_fraction(sample_size + HELD_OUT, summary.count),
        seed=options.seed,
        query=options.query,
        threads=options.training_threads or available_cores(),
        warnings=tuple(warnings),
    )


def _request(options: TrainOptions) -> TrainingRequest:
    text = None
    if options.request:
        try:
            text = read_whole(options.request).decode()
        except (OSError, ValueError) as error:
            raise RequestError(f"cannot read request {options.request!r}: {error}") from error
    return TrainingRequest.parse(
        body(options, text),
        model_id=options.model_id,
        preference=options.preference,
        node_id=options.node_id,
        target_version=options.target_version,
        require_index=not options.parquet,
        require_field=not (options.parquet and options.vector_column),
    )


def _source(options: TrainOptions, request: TrainingRequest) -> VectorSource:
    if options.parquet and options.opensearch_url:
        raise RequestError("give --parquet or --opensearch_url, not both")
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
    return OpenSearchVectors(
        OpenSearchConnection.from_env(url=options.opensearch_url or None),
        request.training_index or "",
        request.training_field,
        request.dimension,
        request.data_type,
        query=options.query,
        seed=options.seed,
        search_size=request.search_size,
        reader=options.reader,
        slices_wanted=options.slices,
    )


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
