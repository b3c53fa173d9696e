# SPDX-License-Identifier: Apache-2.0
"""The command lines that the templates hold, each as the words that a process is started with."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.template_env import TEMPLATES

PROGRAMS = ("knn-train", "knn-models")


@dataclass(frozen=True)
class Command:
    """A command of a template.

    Attributes:
      where: the file, and the container or line.
      words: the program first.
      environment: variables that the template sets for it; those from a secret are left out.
    """

    where: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def documents(path: Path) -> list[dict[str, Any]]:
    """The Kubernetes objects in a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests() -> list[tuple[Path, dict[str, Any]]]:
    files = [*TEMPLATES.glob("kubernetes/*.yaml"), *TEMPLATES.glob("flink/*.yaml")]
    return [(path, document) for path in sorted(files) for document in documents(path)]


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The specs of the pods that an object starts."""
    if document["kind"] == "CronJob":
        yield document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    if document["kind"] == "FlinkDeployment":
        yield document["spec"]["taskManager"]["podTemplate"]["spec"]


def containers(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for pod in pods(document):
        yield from [*pod.get("initContainers", []), *pod["containers"]]


def in_manifests() -> Iterator[Command]:
    for path, document in manifests():
        for container in containers(document):
            words = [*container.get("command", []), *container.get("args", [])]
            if words and words[0] in PROGRAMS:
                variables = {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
                expanded = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in words]  # noqa: B023
                yield Command(f"{path.relative_to(TEMPLATES)} {container['name']}", expanded, variables)


def in_text(path: Path) -> Iterator[Command]:
    """The commands of a shell script or of the code blocks of a Markdown page."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|\|", line):
            if part.strip().startswith(PROGRAMS):
                words = [word for word in shlex.split(part, comments=True) if not re.match(r"\d?>", word)]
                yield Command(str(path.relative_to(TEMPLATES)), words)


def in_workflow() -> Iterator[Command]:
    """What the launcher of the flex template makes of the parameters that the workflow sends."""
    given = launch_parameters()
    yield Command("dataflow/workflow.yaml", ["knn-train", *(f"--{name}={value}" for name, value in given.items())])


def launch_parameters() -> dict[str, str]:
    found: dict[str, str] = launch_request()["launchParameter"]["parameters"]
    return found


def launch_request() -> dict[str, Any]:
    """The body of the call that the workflow makes."""
    steps = yaml.safe_load((TEMPLATES / "dataflow/workflow.yaml").read_text())["main"]["steps"]
    found: dict[str, Any] = next(step["launch"] for step in steps if "launch" in step)["args"]["body"]
    return found


def in_dockerfiles() -> Iterator[Command]:
    for path in sorted(TEMPLATES.glob("*/Dockerfile")):
        for line in re.findall(r"^CMD (\[.*\])$", path.read_text(), re.MULTILINE):
            yield Command(f"{path.relative_to(TEMPLATES)} CMD", json.loads(line))


def everywhere() -> list[Command]:
    texts = [*TEMPLATES.rglob("*.sh"), *TEMPLATES.rglob("*.md")]
    found = [*in_manifests(), *in_workflow(), *in_dockerfiles()]
    return found + [command for path in sorted(texts) for command in in_text(path)]
