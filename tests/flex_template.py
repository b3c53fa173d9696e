# SPDX-License-Identifier: Apache-2.0
"""Writes what a flex template says of its options, from the options themselves: `python -m tests.flex_template`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipelines.options import TrainOptions

FOLDER = Path(__file__).parent.parent / "templates" / "dataflow"
IMAGE = "REGION-docker.pkg.dev/PROJECT/knn-train/train:0.1.0"


def actions() -> list[argparse.Action]:
    """The options of `knn-train`, `--dry_run` aside: a launch has no use for it."""
    parser = argparse.ArgumentParser(add_help=False)
    TrainOptions._add_argparse_args(parser)
    return parser._actions


def name_of(action: argparse.Action) -> str:
    return action.option_strings[0].removeprefix("--")


def metadata() -> dict[str, Any]:
    return {
        "name": "Train a k-NN model for OpenSearch",
        "description": "Samples the vectors of an OpenSearch index or of Parquet files and trains an IVF or PQ model.",
        "streaming": False,
        "parameters": [_parameter(action) for action in actions()],
    }


def _parameter(action: argparse.Action) -> dict[str, Any]:
    name = name_of(action)
    described: dict[str, Any] = {
        "name": name,
        "label": name.replace("_", " ").capitalize(),
        "helpText": help_of(action),
        "isOptional": not action.required,
    }
    if action.nargs == 0:
        return {**described, "paramType": "BOOLEAN"}
    if action.choices:
        return {**described, "paramType": "ENUM", "enumOptions": [{"value": choice} for choice in action.choices]}
    if action.type is int:
        return {**described, "paramType": "NUMBER"}
    return {**described, "paramType": "TEXT"}


def help_of(action: argparse.Action) -> str:
    """What `--help` says of it."""
    return str(action.help) % vars(action)


def files() -> dict[str, str]:
    """File name to content."""
    described = metadata()
    spec = {"image": IMAGE, "sdkInfo": {"language": "PYTHON"}, "metadata": described}
    contents = {"metadata.json": described, "image-spec.json": spec}
    return {name: json.dumps(value, indent=2) + "\n" for name, value in contents.items()}


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content)
