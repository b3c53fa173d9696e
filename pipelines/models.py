# SPDX-License-Identifier: Apache-2.0
"""`knn-models`: what the k-NN plugin's Get, Search and Delete Model APIs are for a cluster, for models in files.

knn-models list --model_dir models
knn-models get MODEL_ID --model_dir models
knn-models delete MODEL_ID --model_dir models
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import display
from transforms.errors import RequestError, TrainingError
from transforms.model_files import ModelFiles


def run(argv: Sequence[str] | None = None) -> None:
    """Runs `knn-models`. Raises RequestError or TrainingError."""
    given = _parser().parse_args(argv)
    files = ModelFiles(given.model_dir)
    if given.command == "get":
        _print_json(files.get(given.model_id))
    elif given.command == "delete":
        files.delete(given.model_id)
        _print_json({"model_id": given.model_id, "result": "deleted"})
    elif sys.stdout.isatty():
        display.columns(("model_id", "state", "method", "dimension", "timestamp"), map(_row, files.list()))
    else:
        _print_json(files.list())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("knn-models", description="Look after trained models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, text in (("get", "print a model's description"), ("delete", "remove a model")):
        command = commands.add_parser(name, help=text)
        command.add_argument("model_id")
        command.add_argument("--model_dir", required=True, help="folder of models, on any Beam filesystem")
    command = commands.add_parser("list", help="all models: a table on a terminal, JSON elsewhere")
    command.add_argument("--model_dir", required=True, help="folder of models, on any Beam filesystem")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RequestError(f"{message}; see knn-models --help")


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    method = model.get("provenance", {}).get("index_description") or model["model_definition"]["name"]
    return model["model_id"], model["state"], method, str(model["dimension"]), model["timestamp"]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def main() -> None:
    """The console script: exit code 2 for a bad request, 1 for a failure."""
    try:
        run()
    except RequestError as error:
        display.say(f"error: {error}")
        sys.exit(2)
    except TrainingError as error:
        display.say(f"failed: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
