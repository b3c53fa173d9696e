# SPDX-License-Identifier: Apache-2.0
"""`knn-models`: looks after trained models, in files (--model_dir) and in clusters (--opensearch_url).

knn-models list --model_dir models
knn-models publish MODEL_ID --model_dir models --opensearch_url https://localhost:9200
knn-models export MODEL_ID --opensearch_url https://old:9200 --model_dir models

User, password and certificates of a cluster come from OPENSEARCH_* variables.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipelines import display, pruning
from pipelines.places import Cluster, Place
from transforms import files
from transforms.codebooks import Codebooks, difference, distances
from transforms.errors import RequestError, TrainingError
from transforms.model import TRAINING, blob_digest
from transforms.model_files import ModelFiles
from transforms.opensearch import OpenSearchConnection, model_index, temporary_index
from transforms.opensearch.moving import request_of
from transforms.opensearch.publishing import cleanup, publish, unfinished
from transforms.opensearch.routes import ROUTES
from transforms.request import MAX_BLOB_BYTES
from transforms.vectors import NUMPY_TYPES, columns

#: What `compare` looks at beside the codebooks.
_COMPARED = ("dimension", "space_type", "data_type", "model_definition", "mode", "compression_level", "model_version")


def run(argv: Sequence[str] | None = None) -> None:
    """Runs `knn-models`. Raises RequestError or TrainingError."""
    given = _parser().parse_args(argv)
    files.set_remote_options({})  # what there is to say is in the environment, as AWS_ENDPOINT_URL
    if getattr(given, "model_dir", None):
        files.check(given.model_dir)
    _COMMANDS[given.command](given)


# --- the commands --------------------------------------------------------------------------------------------------


def _get(given: argparse.Namespace) -> None:
    _print_json(_place(given).get(given.model_id))


def _list(given: argparse.Namespace) -> None:
    models = _place(given).list()
    if sys.stdout.isatty():
        display.columns(("model_id", "state", "method", "dimension", "timestamp"), map(_row, models))
    else:
        _print_json(models)


def _delete(given: argparse.Namespace) -> None:
    _place(given).delete(given.model_id)
    _print_json({"model_id": given.model_id, "result": "deleted"})


def _export(given: argparse.Namespace) -> None:
    cluster, files = _cluster(given), ModelFiles(given.model_dir)
    model = model_index.fetch(cluster.session, given.model_id)
    model = replace(model, provenance={**model.provenance, "source": cluster.url})
    files.claim(model.model_id, model.json() | {"state": TRAINING}, given.overwrite)
    files.write(model)
    _print_json({"model_id": model.model_id, "path": files.path(model.model_id), **blob_digest(model.blob or b"")})


def _publish(given: argparse.Namespace) -> None:
    files, cluster = ModelFiles(given.model_dir), _cluster(given)
    model = replace(files.fetch(given.model_id), model_id=given.new_id or given.model_id)
    request = request_of(model.metadata, model_index.cluster_version(cluster.session))
    vectors = None if given.sample is None else _sample(given.sample, request.dimension, request.data_type)
    result = publish(
        cluster.session,
        model,
        request,
        None if vectors is None else lambda: vectors,
        given.route,
        given.preference,
        given.verify,
        given.allow_large_model,
    )
    for warning in result.warnings:
        display.say(f"warning: {warning}")
    _print_json(asdict(result))


def _compare(given: argparse.Namespace) -> None:
    first = ModelFiles(given.model_dir) if given.model_dir else _cluster(given)
    second = _cluster(given) if given.opensearch_url else first
    one, two = first.get(given.model_id), second.get(given.other_id)
    fields = {name: [one.get(name), two.get(name)] for name in _COMPARED if one.get(name) != two.get(name)}
    blobs = first.blob(given.model_id), second.blob(given.other_id)
    left, right = (Codebooks.of(blob) for blob in blobs)
    _print_json(
        {
            "same_blob": blobs[0] == blobs[1],
            "same_codebooks": difference(left, right) is None,
            "codebooks": difference(left, right) or "equal",
            "mean_distance_to_nearest": distances(left, right),
            "different_fields": fields,
        }
    )


def _usage(given: argparse.Namespace) -> None:
    _print_json(model_index.usage(_cluster(given).session, given.model_id))


def _cleanup(given: argparse.Namespace) -> None:
    session = _cluster(given).session
    found = temporary_index.find(session, given.model_id)
    if given.delete:
        done, failures = [], []
        for index in found:
            try:
                done.append(cleanup(session, index))
            except (RequestError, TrainingError) as error:
                failures.append(f"{index.name}: {error}")
        _print_json(done)
        _raise_if_any(failures)
        return
    begun = unfinished(session)
    _print_json([{**asdict(index), "unfinished_model": index.model_id in begun} for index in found])


def _prune(given: argparse.Namespace) -> None:
    places: dict[str, Place] = {}
    used: dict[str, str] = {}
    if given.model_dir:
        places["model_dir"] = ModelFiles(given.model_dir)
    if given.opensearch_url or not given.model_dir:
        places["cluster"] = cluster = _cluster(given)
        used = cluster.used(warn=not given.delete)
    done = []
    for place, models in places.items():
        for verdict in pruning.verdicts(models.list(), given.pattern, given.keep, used):
            done.append({"place": place, **asdict(verdict), **_carry_out(models, verdict, given.delete)})
    _print_json(done)
    _raise_if_any([f'model "{each["model_id"]}": {each["reason"]}' for each in done if each["result"] == "failed"])


def _raise_if_any(failures: Sequence[str]) -> None:
    """What could not be removed, once all the rest is and was told."""
    if failures:
        raise TrainingError("; ".join(failures))


def _carry_out(models: Place, verdict: pruning.Verdict, delete: bool) -> dict[str, str]:
    if verdict.reason:
        return {"result": "kept"}
    if not delete:
        return {"result": "to delete"}
    try:
        models.delete(verdict.model_id)
    except RequestError as error:  # the plugin knows of a use that this user does not see, or it has gone meanwhile
        return {"result": "kept", "reason": str(error)}
    except TrainingError as error:
        return {"result": "failed", "reason": str(error)}
    return {"result": "deleted"}


# --- flags ---------------------------------------------------------------------------------------------------------

_COMMANDS = {
    "get": _get,
    "list": _list,
    "delete": _delete,
    "export": _export,
    "publish": _publish,
    "compare": _compare,
    "usage": _usage,
    "cleanup": _cleanup,
    "prune": _prune,
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("knn-models", description="Look after trained models, in files and in clusters.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, text: str, *ids: str, files: bool | None = None, cluster: bool | None = None) -> Any:
        """A command; `files` and `cluster`: it needs that place (True), has no use for it (False), or may have it."""
        added = commands.add_parser(name, help=text, description=text)
        for model_id in ids:
            added.add_argument(model_id.strip("?"), nargs="?" if model_id.endswith("?") else None)
        if files is not False:
            added.add_argument("--model_dir", required=bool(files), help="folder of models, on any Beam filesystem")
        if cluster is not False:
            default = "$OPENSEARCH_URL, unless --model_dir is given" if files is None else "$OPENSEARCH_URL"
            added.add_argument("--opensearch_url", metavar="URL", help=f"cluster (default: {default})")
        return added.add_argument

    command("get", "print a model's description", "model_id")
    command("list", "all models: a table on a terminal, JSON elsewhere")
    command("delete", "remove a model", "model_id")
    flag = command("export", "copy a model from a cluster to files", "model_id", files=True)
    flag("--overwrite", action="store_true", help="replace the files of a model with the same id")
    flag = command("publish", "put a model from files into a cluster", "model_id", files=True)
    flag("--new_id", help="id in the cluster (default: the same)")
    flag("--route", choices=ROUTES, default="auto", help="how (default: the best that is possible; it says why)")
    flag("--preference", "--node_id", help="data node that should train")
    flag("--sample", metavar="FILE.npy", help="(n, columns) vectors for the route delegate")
    flag("--no_verify", dest="verify", action="store_false", help="do not try the model in a mapping and a search")
    flag("--allow_large_model", action="store_true", help=f"publish more than {MAX_BLOB_BYTES:,} bytes")
    text = "how two models differ; with both places, the first is in the files and the second in the cluster"
    command("compare", text, "model_id", "other_id")
    command("usage", "which indices and fields use a model, or any model", "model_id?", files=False)
    text = "temporary indices and unfinished models that interrupted runs left; lists them"
    flag = command("cleanup", text, "model_id?", files=False)
    flag("--delete", action="store_true", help="remove them; make sure that no run is alive")
    text = (
        "old models of a schedule: all that the pattern names but the newest, and those in use or in training; "
        "lists them. With both places, files of models that the cluster uses stay too"
    )
    flag = command("prune", text)
    flag("pattern", help="model id with {date}, {time}, {sha} or *")
    flag("--keep", type=int, required=True, metavar="N", help="created models to keep beside those in use")
    flag("--delete", action="store_true", help="remove them")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RequestError(f"{message}; see knn-models --help")


def _place(given: argparse.Namespace) -> Place:
    if given.model_dir and given.opensearch_url:
        raise RequestError("give --model_dir or --opensearch_url, not both")
    if given.model_dir:
        return ModelFiles(given.model_dir)
    if not given.opensearch_url and not os.environ.get("OPENSEARCH_URL"):
        raise RequestError("say where the models are: --model_dir FOLDER or --opensearch_url URL")
    return _cluster(given)


def _cluster(given: argparse.Namespace) -> Cluster:
    return Cluster(OpenSearchConnection.from_env(url=given.opensearch_url or None))


def _sample(path: str, dimension: int, data_type: str) -> np.ndarray:
    try:
        vectors = np.load(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"--sample {path} cannot be read: {error}") from None
    if not isinstance(vectors, np.ndarray):
        raise RequestError(f"--sample {path} has several arrays, expected one (.npy)")
    width, dtype = columns(dimension, data_type), NUMPY_TYPES[data_type]
    if vectors.ndim != 2 or vectors.shape[1] != width or vectors.dtype != dtype:
        raise RequestError(f"--sample {path} has {vectors.shape} {vectors.dtype}, expected (n, {width}) {dtype}")
    return vectors


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    method = model.get("provenance", {}).get("index_description") or model["model_definition"]["name"]
    state = model["state"] + (", unfinished" if "unfinished" in model else "")
    return model["model_id"], state, method, str(model["dimension"]), model["timestamp"]


def _print_json(value: Any) -> None:
    """For people with indents; for programs one line, the last of the output."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def main() -> None:
    """The console script: exit code 2 for a bad request, 1 for a failure, 130 for Ctrl-C or a polite kill."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except RequestError as error:
        display.say(f"error: {error}")
        sys.exit(2)
    except TrainingError as error:
        display.say(f"failed: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        display.say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
