# SPDX-License-Identifier: Apache-2.0
"""What came of a run. The steps report it as files in the run's folder: remote runners return nothing else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import display
from pipelines.plan import Plan
from transforms.comparison import Previous, own_error
from transforms.errors import TrainingError
from transforms.files import join, read_whole, write_whole
from transforms.model import CREATED, metadata, sha256
from transforms.model_files import ModelFiles, WrittenModel
from transforms.opensearch.writing import WriteToModelIndexResult
from transforms.recall import searched_with

#: The two steps that report.
WRITTEN, PUBLISHED = "written", "published"


def report_path(folder: str, plan: Plan, step: str) -> str:
    return join(folder, f"{sha256(plan.model_id.encode())[:16]}.{step}.json")


def hand_over_previous(folder: str, plan: Plan) -> Previous | None:
    """Puts the blob of the model to compare with where the training step finds it: job graphs hold no data."""
    if plan.previous is None:
        return None
    path = report_path(folder, plan, "previous")
    write_whole(path, plan.previous.blob or b"")
    error = own_error(plan.previous.json(), metadata(plan.request, CREATED))
    return Previous(plan.previous.model_id, path, error, plan.least_gain)


def report(result: WrittenModel | WriteToModelIndexResult, path: str) -> None:
    write_whole(path, json.dumps(asdict(result)).encode())


@dataclass(frozen=True)
class Outcome:
    """What the steps of one plan reported.

    Attributes:
      written: the fields of a WrittenModel.
      published: the fields of a WriteToModelIndexResult, None if there was nothing to publish.
    """

    written: Mapping[str, Any]
    published: Mapping[str, Any] | None


def read(folder: str, plan: Plan) -> Outcome:
    """What was reported. Raises TrainingError if a step did not report."""
    written = _read_report(report_path(folder, plan, WRITTEN), plan)
    if plan.publication is None or written["state"] != CREATED:
        return Outcome(written, None)
    return Outcome(written, _read_report(report_path(folder, plan, PUBLISHED), plan))


def _read_report(path: str, plan: Plan) -> Mapping[str, Any]:
    try:
        found: dict[str, Any] = json.loads(read_whole(path))
    except FileNotFoundError:
        raise TrainingError(f'the run ended without a word of model "{plan.model_id}"') from None
    return found


def tell(
    plans: Sequence[Plan],
    outcomes: Sequence[Outcome],
    files: ModelFiles,
    seconds: float,
    counted: Mapping[str, int],
) -> list[Mapping[str, Any]]:
    """Prints what came of each plan.

    Returns:
      The descriptions of the created models. Where the model before was kept there is none, and nothing is left of the
      new one.

    Raises:
      TrainingError: a training or a publication failed.
    """
    problems: list[str] = []
    models: list[Mapping[str, Any]] = []
    for plan, outcome in zip(plans, outcomes, strict=True):
        name = f'model "{plan.model_id}": ' if len(plans) > 1 else ""
        if outcome.written["kept"] and plan.previous is not None:
            display.say(f"{name}{outcome.written['kept']}")
            continue
        if outcome.written["state"] != CREATED:
            problems.append(name + (outcome.written["error"] or f"the model is in state {outcome.written['state']}"))
            continue
        models.append(files.get(plan.model_id))
        if plan.accelerator and not models[-1]["provenance"]["training_gpus"]:
            display.say(f"warning: {name}it was trained without a GPU: faiss on that worker sees none")
        rows = _summary(models[-1], files.path(plan.model_id), seconds)
        if outcome.published is not None:
            if outcome.published["state"] == CREATED:
                rows += _published_rows(outcome.published)
            else:
                problems.append(
                    f"{name}it was trained but not published: {outcome.published['error']}; "
                    f"knn-models publish {shlex.quote(plan.model_id)} tries that alone"
                )
        display.table(rows)
    totals = [(label, f"{counted[name]:,}") for name, label in _COUNTED if counted.get(name)]
    if totals:
        display.table(totals)
    for plan, outcome in zip(plans, outcomes, strict=True):
        _print_result(plan, files, outcome.written, outcome.published or {})
    if problems:
        raise TrainingError("; ".join(problems))
    return models


def tell_states(
    plans: Sequence[Plan], files: ModelFiles, before: Mapping[str, Mapping[str, Any]], state: str, error: str = ""
) -> None:
    """Prints what has come of the models so far, where no step has reported: the run failed or goes on elsewhere.

    Args:
      before: descriptions of models that the run was to overwrite.
      state, error: of those that it did not overwrite, whatever state they are in themselves, and of those that are
        gone because an older model is kept.
    """
    for plan in plans:
        found = files.get(plan.model_id) if files.state(plan.model_id) else None
        if found is None or found == before.get(plan.model_id):
            found = {"state": state, "error": error}
        _print_result(plan, files, found, {})


def _print_result(plan: Plan, files: ModelFiles, written: Mapping[str, Any], published: Mapping[str, Any]) -> None:
    """A line of JSON for the program that started the run; the last lines on stdout are these, one for each model.

    Where the model before was kept, the line is about that, with the reason in `kept`.
    """
    kept = written.get("kept") or ""
    done = published.get("state") == CREATED
    model_id = plan.previous.model_id if kept and plan.previous is not None else plan.model_id
    result = {
        "model_id": model_id,
        "state": CREATED if kept else written["state"],
        "error": "" if kept else written["error"] or published.get("error", ""),
        "kept": kept,
        "path": files.path(model_id) if files.state(model_id) else None,
        "published": done,
        "route": published.get("route") if done else None,
        "exact": published.get("exact") if done else None,
    }
    print(json.dumps(result), flush=True)


def _summary(model: Mapping[str, Any], path: str, seconds: float) -> list[tuple[str, str]]:
    told = model["provenance"]
    training = told["seconds"]
    return [
        ("model", model["model_id"]),
        ("written to", path),
        ("method", f"{told['index_description']}, {model['space_type']}, dimension {model['dimension']}"),
        ("vectors in source", f"{told['vectors_in_source']:,}"),
        ("trained on", f"{told['vectors_sampled']:,}"),
        ("seconds", f"{seconds:.1f} in all, {training['train']:.1f} training on {_trained_on(told)}"),
        ("training memory", f"{told['training_peak_memory_bytes'] / 1e6:,.0f} MB at its peak"),
        *_quality_rows(model.get("quality")),
        ("model bytes", f"{told['blob_bytes']:,}"),
        ("sha256", told["blob_sha256"]),
    ]


def _trained_on(told: Mapping[str, Any]) -> str:
    threads = f"{told['training_threads']} threads"
    gpus = told["training_gpus"]
    return f"{gpus} GPU{'s' * (gpus > 1)} and {threads}" if gpus else threads


def _quality_rows(quality: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if quality is None:
        return []
    at, memory = quality["at"], quality["memory"]
    shares = ", ".join(f"{share:.3f} @{k} (measured {at['measured'][k]:.3f})" for k, share in at["expected"].items())
    rows = [("recall to expect", f"{shares}, {searched_with(at)}")]
    if "lists" in quality:
        lists = quality["lists"]
        rows.append(("inverted lists", f"imbalance {lists['imbalance_factor']:.2f}, {lists['empty']:,} empty"))
    size = f"{memory['bytes_per_vector']:,.0f} bytes a vector, {memory['vectors_bytes'] / 1e6:,.1f} MB for all"
    rows.append(("memory of an index", f"{size}, {memory['segment_bytes'] / 1e6:,.1f} MB more a segment"))
    if "previous" in quality:
        old = quality["previous"]
        rows.append(("error", f"{old['error_of_new']:.5g}, that of {old['model_id']} {old['error']:.5g}"))
        shares = ", ".join(f"{share:.3f} @{k}" for k, share in old["expected"].items())
        rows.append((f"recall of {old['model_id']}", shares))
    return rows


def _published_rows(published: Mapping[str, Any]) -> list[tuple[str, str]]:
    for warning in published["warnings"]:
        display.say(f"warning: {warning}")
    exact = "ours, bit by bit" if published["exact"] else "not ours bit by bit"
    return [("published by", published["explanation"]), ("codebooks there", exact)]


#: Counters that are shown where they are not zero.
_COUNTED = (
    ("vectors_rejected", "bad vectors"),
    ("documents_without_vector", "without a vector"),
    ("requests_retried", "requests retried"),
    ("paused_msec", "ms paused, cluster busy"),
    ("bytes_received", "bytes received"),
)


def counters(result: Any) -> dict[str, int]:
    """The counters of a pipeline's result, by name."""
    found: dict[str, int] = {}
    for counter in result.metrics().query()["counters"]:
        # Prism has no `attempted` values, so what it counted as 0 comes as None.
        found[counter.key.metric.name] = found.get(counter.key.metric.name, 0) + (counter.result or 0)
    return found
