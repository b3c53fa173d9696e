# SPDX-License-Identifier: Apache-2.0
"""The README says what the program does: its flags, its commands, its version table."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from pipelines import models
from pipelines.options import TrainOptions, parse
from transforms.request import TrainingRequest
from transforms.versions import VERSION_RULES

README = (Path(__file__).parent.parent / "README.md").read_text()


def version_table() -> str:
    rows = "\n".join(f"| {since} | {rule} |" for since, rule in VERSION_RULES)
    return f"| since | rule |\n| --- | --- |\n{rows}\n"


def test_version_table_is_the_program_s() -> None:
    shown = README.partition("<!-- versions -->\n")[2].partition("<!-- /versions -->")[0]
    assert shown == version_table()


def test_every_flag_is_there_and_no_other() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    TrainOptions._add_argparse_args(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings} | {"--dry_run"}
    shown = set(re.findall(r"(?<![\w-])--[a-z_]+", README.partition("## Options")[2].partition("\nConnection:")[0]))
    assert shown - {"--temp_location", "--runner"} == flags


def commands(program: str) -> list[str]:
    blocks = re.findall(r"```\w*\n(.*?)```", README.replace("\\\n", ""), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(f"{program} ")]


@pytest.mark.parametrize("line", commands("knn-train"))
def test_train_commands_parse(line: str) -> None:
    options, _ = parse(shlex.split(line, comments=True)[1:])
    assert options.request[0].endswith(".json")
    assert bool(options.parquet) != bool(options.opensearch_url)


@pytest.mark.parametrize("line", commands("knn-models"))
def test_models_commands_parse(line: str) -> None:
    assert models._parser().parse_args(shlex.split(line, comments=True)[1:]).command


def test_there_are_commands_to_parse() -> None:
    assert len(commands("knn-train")) >= 3
    assert len(commands("knn-models")) >= 3


def test_request_in_the_readme_is_accepted() -> None:
    body = re.search(r"```json\n(.*?)```", README, re.DOTALL)
    assert body is not None
    assert TrainingRequest.parse(body.group(1)).index_description == "IVF1024,PQ96x8"
