# SPDX-License-Identifier: Apache-2.0
"""`TrainOptions`: the flags of `knn-train`. The API's fields keep their names."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

from pipelines import remote
from transforms.errors import RequestError
from transforms.opensearch.reading import MAX_REQUESTS_IN_FLIGHT
from transforms.opensearch.routes import ROUTES
from transforms.quality import EVAL_VECTORS
from transforms.request import NEWEST_TARGET
from transforms.request_body import read_json

#: Fields of the Train API's body that are flags too.
BODY_FIELDS = (
    "training_index",
    "training_field",
    "dimension",
    "max_training_vector_count",
    "search_size",
    "description",
    "method",
    "space_type",
    "data_type",
    "mode",
    "compression_level",
    "engine",
)


class TrainOptions(PipelineOptions):
    """Options of one training run. Secrets have no flag: they come from `OPENSEARCH_*` variables or files."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        request = parser.add_argument_group("the request, as the Train Model API takes it").add_argument
        text = "JSON file with the body; flags override its fields. Give it several times to train several models"
        request("--request", metavar="FILE", action="append", help=text)
        text = (
            "id of the new model, with {date}, {time} and {sha} filled in; random if absent. One for each --request, "
            "in the same order"
        )
        request("--model_id", action="append", help=text)
        request("--preference", help="data node that trains, where the cluster trains")
        request("--node_id", help="another name for --preference")
        request("--training_index", help="index, alias, wildcard or data stream to read vectors from")
        request("--training_field", help="field, or Parquet column, that holds the vectors")
        request("--dimension", type=_json("dimension"), help="dimension of the vectors")
        request("--max_training_vector_count", type=_json("max_training_vector_count"), help="most vectors to train on")
        request("--search_size", type=_json("search_size"), help="most vectors in a page from OpenSearch, 1 to 10000")
        request("--description", help="text to keep with the model; no commas")
        request("--method", type=_json("method"), metavar="JSON", help="the method object")
        request("--space_type", help="l2, innerproduct, cosinesimil or hamming")
        request("--data_type", help="float, byte or binary")
        request("--mode", help="in_memory or on_disk")
        request("--compression_level", help="1x, 2x, 8x, 16x or 32x")
        request("--engine", help="faiss")
        text = f"OpenSearch that will serve it (default: that of the cluster to --publish to, else {NEWEST_TARGET})"
        request("--target_version", help=text)

        source = parser.add_argument_group("where the vectors come from").add_argument
        source("--parquet", metavar="GLOB", help="Parquet files on any Beam filesystem")
        source("--vector_column", help="column of the Parquet files (default: training_field)")
        text = "cluster to read from, unless --parquet is given, and to --publish to (default: $OPENSEARCH_URL)"
        source("--opensearch_url", metavar="URL", help=text)
        source("--query", type=_json("query"), metavar="JSON", help="train on the documents that match it")
        source(
            "--reader",
            choices=("auto", "docvalues", "script", "source"),
            default="auto",
            help="how OpenSearch is asked for vectors (default: the fastest way that it answers correctly)",
        )
        source("--slices", type=int, default=0, help="parts of an index to read independently (default: by its size)")
        source(
            "--max_requests_in_flight",
            type=int,
            default=MAX_REQUESTS_IN_FLIGHT,
            metavar="N",
            help="most requests of one worker process that the cluster works on at a time (default %(default)s)",
        )
        source("--max_bad_vectors", type=int, default=0, help="bad vectors to pass over and list (default 0)")

        run = parser.add_argument_group("sample, training and result").add_argument
        run("--model_dir", metavar="FOLDER", help="folder for model files, on any Beam filesystem")
        run("--overwrite", action="store_true", help="replace the files of a model with the same id")
        run("--seed", type=int, default=0, help="of the sample (default 0)")
        text = "train on the sample of a run that failed after reading; --temp_location must be the same"
        run("--resume", action="store_true", help=text)
        run("--use_all_vectors", action="store_true", help="train on more vectors than faiss looks at")
        run("--training_threads", type=int, default=0, help="threads to train with (default: all cores)")
        text = (
            "Beam's hint for the worker that trains, as 'type:nvidia-tesla-t4;count:1;install-nvidia-driver'; its "
            "faiss must be built for GPUs"
        )
        run("--accelerator", metavar="HINT", help=text)
        run("--allow_large_model", action="store_true", help="train a model that clusters cannot read by default")

        clustering = parser.add_argument_group("k-means").add_argument
        clustering("--niter", type=int, help="iterations of each k-means (default: 10 for centroids, 25 for PQ)")
        clustering("--nredo", type=int, help="runs of each k-means, of which the best counts (default 1)")

        quality = parser.add_argument_group("how good it must be").add_argument
        text = (
            f"vectors to hold out and measure with, and a tenth as queries; 0 measures nothing (default {EVAL_VECTORS})"
        )
        quality("--eval_vectors", type=int, default=EVAL_VECTORS, metavar="N", help=text)
        text = "least recall to expect in the whole source, as 0.85@10 or 0.85@10/nprobes=16; below it the model fails"
        quality("--min_recall", metavar="RECALL@K", help=text)
        text = "largest imbalance factor of the inverted lists, 1 for lists of one size; above it the model fails"
        quality("--max_imbalance", type=float, metavar="FACTOR", help=text)
        text = (
            "model in --model_dir, or else in the cluster, to compare errors with on the same held-out vectors; a "
            "pattern with {date}, {time}, {sha} or * is the newest that it gives"
        )
        quality("--compare_to", metavar="MODEL_ID", help=text)
        text = "keep the model of --compare_to unless the new one's error is smaller by this share, as 2%%"
        quality("--only_if_better", metavar="SHARE", help=text)

        text = "try a few requests on one sample and print the best; writes no model"
        quality("--suggest", action="store_true", help=text)
        text = "most memory for a vector that --suggest may choose"
        quality("--max_bytes_per_vector", type=float, metavar="BYTES", help=text)

        publish = parser.add_argument_group("into a cluster").add_argument
        text = "put the model into the cluster too, by this route; auto takes the best that is possible and says why"
        publish("--publish", choices=ROUTES, metavar="ROUTE", help=f"{text} ({', '.join(ROUTES)})")
        text = "do not try the published model in a mapping and a search"
        publish("--no_verify", dest="verify", action="store_false", help=text)


_DRY_RUN = "--dry_run"


def parse(argv: Sequence[str]) -> tuple[TrainOptions, bool]:
    """The options and whether `--dry_run` was given.

    Beam has a `--dry_run` of its own that means something else, so ours is taken out first.

    Raises:
      RequestError: a flag is unknown or a value does not fit; it names the flag and the nearest one.
    """
    ours = _Parser(allow_abbrev=False, add_help=False)
    TrainOptions._add_argparse_args(ours)
    words = _without_values(argv, ours)
    rest = [word for word in words if word != _DRY_RUN]
    _, others = ours.parse_known_args(rest)
    _refuse_unknown(others, ours)
    return TrainOptions(rest), _DRY_RUN in words


def _without_values(words: Sequence[str], ours: argparse.ArgumentParser) -> list[str]:
    """`words` with the values taken off flags that have none: launchers of Dataflow templates write `--flag=true`."""
    bare = {_DRY_RUN, *(name for action in ours._actions if action.nargs == 0 for name in action.option_strings)}
    kept = []
    for word in words:
        name, given, value = word.partition("=")
        if name == _DRY_RUN and given and value.lower() not in ("true", "false"):
            raise RequestError(f"dry_run is {value!r}, expected nothing, true or false")
        if name not in bare or value.lower() not in ("true", "false"):
            kept.append(word)
        elif value.lower() == "true":
            kept.append(name)
    return kept


def print_help() -> None:
    """The flags of `knn-train`, without Beam's."""
    parser = argparse.ArgumentParser(
        "knn-train",
        allow_abbrev=False,
        description="Train a model for OpenSearch's k-NN plugin outside the cluster.",
        epilog="Beam's own options, such as --runner and --temp_location, are accepted too.",
    )
    TrainOptions._add_argparse_args(parser)
    parser.add_argument(_DRY_RUN, action="store_true", help="check everything, print the plan and write nothing")
    parser.print_help()


def body(options: TrainOptions, request: bytes | None) -> str:
    """The Train API body: the JSON of --request, with the flags that were given in place of its fields.

    Raises:
      RequestError: `request` is not a JSON object, or has a field twice.
    """
    given = {name: getattr(options, name) for name in BODY_FIELDS if getattr(options, name) is not None}
    return json.dumps({**dict(read_json(request) if request is not None else ()), **given})


class _Parser(_BeamArgumentParser):
    def error(self, message: str) -> Any:
        raise RequestError(message)


def _json(name: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name} is {text!r}, which is not JSON: {error}") from None

    return read


def _refuse_unknown(words: Sequence[str], ours: argparse.ArgumentParser) -> None:
    if not words:
        return
    beams = _Parser(allow_abbrev=False, add_help=False)
    for options in {str(kind): kind for kind in PipelineOptions.__subclasses__()}.values():
        if options is not TrainOptions:
            options._add_argparse_args(beams)
    found, unknown = beams.parse_known_args(list(words))
    if unknown and found.job_endpoint not in (None, "embed"):
        remote.add_flags(beams, found.job_endpoint)
        _, unknown = beams.parse_known_args(list(words))
    if not unknown:
        return
    flag = unknown[0].partition("=")[0]
    known = [name for parser in (ours, beams) for action in parser._actions for name in action.option_strings]
    nearest = difflib.get_close_matches(flag, known, 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; see --help"
    raise RequestError(f"unknown flag {flag}{hint}" if flag.startswith("-") else f"unexpected argument {flag!r}")
