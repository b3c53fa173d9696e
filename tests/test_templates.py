# SPDX-License-Identifier: Apache-2.0
"""Every template is read by what will read it: the program's own parser, the schemas of Kubernetes, the Flink operator
and Google's APIs, a linter for Dockerfiles, pip, Airflow and Dataflow's job graph. Those that can run here are run in
`test_template_runs.py`.
"""

from __future__ import annotations

import ast
import base64
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import apache_beam as beam
import jsonschema
import kubernetes_validate
import pytest
import yaml
from cronsim import CronSim

from pipelines import models
from pipelines.options import TrainOptions, parse
from tests import flex_template, template_commands, template_env
from tests.runners import CHECKOUT, required
from tests.template_commands import Command, containers, documents, manifests, pods
from tests.template_env import DOCKERFILES, TEMPLATES
from transforms import yaml as transforms_yaml
from transforms.model_ids import matcher
from transforms.request import TrainingRequest

#: The oldest Kubernetes with sidecars among the initContainers, and the newest that the package knows.
KUBERNETES = ("1.29", kubernetes_validate.latest_version())

# --- commands ------------------------------------------------------------------------------------------------------

COMMANDS = template_commands.everywhere()


@pytest.mark.parametrize("command", COMMANDS, ids=[command.where for command in COMMANDS])
def test_commands_are_what_the_programs_take(command: Command) -> None:
    program, *words = command.words
    if "--help" in words:
        return
    if program == "knn-models":
        given = models._parser().parse_args(words)
        if given.command == "prune":
            assert matcher(given.pattern)("products-20261124-0123abcd")
        return
    options, _ = parse([*words, "--dry_run"])
    assert options.request
    assert options.model_dir
    assert not options.parquet or options.vector_column or options.opensearch_url or not options.publish
    assert options.compare_to in (None, options.model_id[0]), "the model before is the newest of the same pattern"
    for model_id in options.model_id or []:
        assert re.search(r"\{(date|time)\}", model_id), "a schedule needs a new id for each run"
    unknown = [word for word in words if re.search(r"password|token|secret", word, re.IGNORECASE)]
    assert not unknown, "secrets have no place in a command"


def test_every_kind_of_template_has_commands() -> None:
    found = {command.where.partition("/")[0] for command in COMMANDS if command.words[0] == "knn-train"}
    assert {"kubernetes", "flink", "dataflow", "cron"} <= found
    assert len(COMMANDS) >= 8


# --- request bodies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("specs/*.json")), ids=lambda path: path.name)
def test_specs_are_accepted_and_listed(path: Path) -> None:
    request = TrainingRequest.parse(path.read_text())
    assert request.check_limits() == []
    rows = [line for line in (TEMPLATES / "specs/README.md").read_text().splitlines() if f"]({path.name})" in line]
    assert len(rows) == 1
    assert rows[0].split("|")[-2].strip() == f"{request.usable_vectors:,}"


def test_requests_in_manifests_are_accepted() -> None:
    maps = [document for _, document in manifests() if document["kind"] == "ConfigMap"]
    assert [TrainingRequest.parse(each["data"]["request.json"]).index_description for each in maps] == [
        "IVF4096,PQ96x8"
    ]


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles(path: Path) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert all(":" in image and not image.endswith(":latest") for image in images)
    assert {image for image in images if "beam" in image} <= {f"apache/beam_python3.11_sdk:{beam.__version__}"}
    assert all("3.11" in image or "311" in image for image in images)
    sent = set((CHECKOUT / ".dockerignore").read_text().splitlines())
    for _, rest in (step for step in template_env.install_steps(path) if step[0] == "COPY"):
        for source in rest.split()[:-1]:
            assert (CHECKOUT / source).exists()
            assert f"!{source}" in sent


def test_images_install_the_same_way_and_pip_finds_no_conflict() -> None:
    runs = [[step for step in template_env.install_steps(path) if step[0] == "RUN"] for path in DOCKERFILES]
    assert runs == [runs[0]] * len(DOCKERFILES)
    assert "pip check" in runs[0][0][1]
    python = required(template_env.image_python)  # runs them
    shown = "import importlib.metadata as m; print(m.version('apache-beam'), m.version('faiss-cpu'))"
    done = template_env.run([str(python), "-c", shown], env=template_env.checkout_environment())
    locked = (CHECKOUT / ".ci/constraints.txt").read_text()
    wanted = [re.search(rf"^{name}==(\S+)", locked, re.MULTILINE) for name in ("apache-beam", "faiss-cpu")]
    assert done.stdout.split() == [found[1] for found in wanted if found]


def test_the_flex_template_starts_this_program() -> None:
    text = (TEMPLATES / "dataflow/Dockerfile").read_text()
    started = re.search(r"^ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/knn-train/(\S+)", text, re.MULTILINE)
    assert started is not None
    assert re.search(rf"^COPY templates/dataflow/{started[1]} \./$", text, re.MULTILINE)
    done = template_env.run([sys.executable, str(TEMPLATES / "dataflow" / started[1]), "--help"])
    assert done.stdout.startswith("usage: knn-train")


# --- Kubernetes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_fit_kubernetes(version: str) -> None:
    kinds = []
    for _, document in manifests():
        if document["kind"] != "FlinkDeployment":
            kubernetes_validate.validate(document, version, strict=True)
            kinds.append(document["kind"])
    assert kinds.count("CronJob") == 2


def test_manifests_fit_the_flink_operator() -> None:
    found = [document for _, document in manifests() if document["kind"] == "FlinkDeployment"]
    schema = required(lambda: template_env.flink_schema("FlinkDeployment"))
    validator = jsonschema.Draft202012Validator(_closed(schema))
    for document in found:
        validator.validate(document)
        wrong = json.loads(json.dumps(document).replace("numberOfTaskSlots", "x").replace('"replicas"', '"replica"'))
        with pytest.raises(jsonschema.ValidationError, match="replica"):
            validator.validate(wrong)
    assert len(found) == 1


def _closed(schema: Any, top: bool = True) -> Any:
    """The schema with fields that it does not name refused, which the API server would drop without a word."""
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value, False) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        closed["properties"] = {key: _closed(value, False) for key, value in schema["properties"].items()}
        if not top and not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        closed = {"type": ["integer", "string"]}
    return closed


def test_manifests_refer_to_what_is_there() -> None:
    claims = {
        document["metadata"]["name"] for _, document in manifests() if document["kind"] == "PersistentVolumeClaim"
    }
    maps = {document["metadata"]["name"] for _, document in manifests() if document["kind"] == "ConfigMap"}
    for path, document in manifests():
        for pod in pods(document):
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            for container in containers(document):
                mounts = container.get("volumeMounts", [])
                assert {mount["name"] for mount in mounts} <= set(volumes), path
                for variable in container.get("env", []):
                    if variable["name"].endswith(("_FILE", "_CERTS")):
                        folder = next(mount for mount in mounts if variable["value"].startswith(mount["mountPath"]))
                        items = {item["path"] for item in volumes[folder["name"]]["secret"]["items"]}
                        assert variable["value"].rpartition("/")[2] in items
                image = container.get("image", ":fixed")  # the operator sets Flink's own
                assert ":" in image
                assert not image.endswith(":latest")
            for volume in volumes.values():
                assert volume.get("persistentVolumeClaim", {}).get("claimName", next(iter(claims))) in claims
                assert volume.get("configMap", {}).get("name", next(iter(maps))) in maps


def test_flink_s_parts_agree() -> None:
    (deployment,) = documents(TEMPLATES / "flink/flink-deployment.yaml")
    job = documents(TEMPLATES / "flink/train-cronjob.yaml")[-1]
    spec = deployment["spec"]
    minor = spec["flinkVersion"].removeprefix("v").replace("_", ".")
    assert spec["image"].startswith(f"flink:{minor}.")
    server, submitter, *_ = containers(job)
    assert server["image"] == f"apache/beam_flink{minor}_job_server:{beam.__version__}"
    artifacts = next(word.partition("=")[2] for word in server["args"] if word.startswith("--artifacts-dir="))
    flink = next(each for each in containers(deployment) if each["name"] == "flink-main-container")
    for container in (server, flink):
        assert any(artifacts.startswith(mount["mountPath"]) for mount in container["volumeMounts"])
    assert f"--flink-master={deployment['metadata']['name']}-rest:8081" in server["args"]
    pool = next(each for each in containers(deployment) if each["name"] == "python-workers")
    assert pool["image"] == submitter["image"]
    options, _ = parse(submitter["args"])
    flags = options.get_all_options()
    assert flags["job_endpoint"] == f"localhost:{server['startupProbe']['tcpSocket']['port']}"
    assert flags["environment_config"] == f"localhost:{pool['ports'][0]['containerPort']}"
    assert flags["environment_type"] == "EXTERNAL"
    assert flags["parallelism"] == spec["taskManager"]["replicas"]
    assert spec["flinkConfiguration"]["taskmanager.numberOfTaskSlots"] == "1"
    # What the submitter is told of secrets, the workers must find too.
    assert {each["name"]: each.get("value") for each in pool["env"]}.items() <= {
        each["name"]: each.get("value") for each in submitter["env"]
    }.items()
    shared = {mount["mountPath"] for mount in pool["volumeMounts"]}
    for flag in ("model_dir", "temp_location"):
        assert any(flags[flag].startswith(path) for path in shared)


# --- schedules -----------------------------------------------------------------------------------------------------


def schedules() -> dict[str, str]:
    found = {
        f"{path.parent.name}/{path.name}": document["spec"]["schedule"]
        for path, document in manifests()
        if document["kind"] == "CronJob"
    }
    found["dataflow"] = json.loads((TEMPLATES / "dataflow/scheduler-job.json").read_text())["schedule"]
    lines = (TEMPLATES / "cron/knn-train.crontab").read_text().splitlines()
    (found["cron"],) = [" ".join(line.split()[:5]) for line in lines if re.match(r"[\d*]", line)]
    module = ast.parse((TEMPLATES / "airflow/train_knn_model.py").read_text())
    (found["airflow"],) = [
        ast.literal_eval(keyword.value)
        for call in ast.walk(module)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "schedule"
    ]
    return found


@pytest.mark.parametrize(("where", "schedule"), schedules().items())
def test_schedules_are_cron_expressions(where: str, schedule: str) -> None:
    from datetime import datetime

    following = next(CronSim(schedule, datetime(2026, 11, 24)))
    assert following == datetime(2026, 11, 29, 3), where


def test_crontab_starts_the_script() -> None:
    lines = (TEMPLATES / "cron/knn-train.crontab").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))
    (line,) = [line for line in lines if re.match(r"[\d*]", line)]
    assert line.split()[6] == "/opt/knn-train/retrain.sh"
    assert settings["OPENSEARCH_PASSWORD_FILE"].startswith("/")
    assert "OPENSEARCH_PASSWORD" not in settings
    subprocess.run(["sh", "-n", str(TEMPLATES / "cron/retrain.sh")], check=True)


# --- Dataflow ------------------------------------------------------------------------------------------------------


def test_metadata_is_up_to_date() -> None:
    for name, content in flex_template.files().items():
        assert (TEMPLATES / "dataflow" / name).read_text() == content, "run `python -m tests.flex_template`"


def test_every_option_is_one_parameter() -> None:
    shown = json.loads((TEMPLATES / "dataflow/metadata.json").read_text())["parameters"]
    actions = {flex_template.name_of(action): action for action in flex_template.actions()}
    assert [parameter["name"] for parameter in shown] == list(actions)
    for parameter in shown:
        action = actions[parameter["name"]]
        assert parameter["helpText"] == flex_template.help_of(action)
        # As the launcher of a template writes it.
        value = {"BOOLEAN": "true", "NUMBER": "3", "ENUM": str((action.choices or [""])[-1])}.get(
            parameter["paramType"], "7"
        )
        flag = f"--{parameter['name']}"
        options, _ = parse([f"{flag}={value}"])
        assert options.get_all_options(drop_default=True)[action.dest] is not None
        if parameter["paramType"] == "BOOLEAN":
            default, _ = parse([f"{flag}=false"])
            assert getattr(default, action.dest) == action.default != getattr(options, action.dest)


def test_files_fit_google_s_apis() -> None:
    folder = TEMPLATES / "dataflow"
    for api, name, value in (
        ("dataflow.v1b3", "TemplateMetadata", json.loads((folder / "metadata.json").read_text())),
        ("dataflow.v1b3", "ContainerSpec", json.loads((folder / "image-spec.json").read_text())),
        ("dataflow.v1b3", "LaunchFlexTemplateRequest", template_commands.launch_request()),
        ("cloudscheduler.v1", "Job", json.loads((folder / "scheduler-job.json").read_text())),
    ):
        schema = required(lambda api=api, name=name: template_env.google_schema(api, name))  # type: ignore[misc]
        validator = jsonschema.Draft202012Validator(schema)
        validator.validate(value)
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**value, "is_optional": "true"})


def test_each_run_has_a_job_name_of_its_own() -> None:
    steps = yaml.safe_load((TEMPLATES / "dataflow/workflow.yaml").read_text())["main"]["steps"]
    (assigned,) = [entry["job"] for step in steps for entry in step.get("name", {}).get("assign", []) if "job" in entry]
    assert "sys.now()" in assigned
    assert template_commands.launch_request()["launchParameter"]["jobName"] == "${job}"
    scheduler = json.loads((TEMPLATES / "dataflow/scheduler-job.json").read_text())
    assert scheduler["httpTarget"]["uri"].endswith("/workflows/knn-train/executions")
    assert json.loads(base64.b64decode(scheduler["httpTarget"]["body"])) == {}
    image = json.loads((TEMPLATES / "dataflow/image-spec.json").read_text())["image"]
    assert template_commands.launch_request()["launchParameter"]["environment"]["sdkContainerImage"] == image


# --- all of them ---------------------------------------------------------------------------------------------------


def test_the_page_says_how_each_was_validated() -> None:
    page = (TEMPLATES / "README.md").read_text()
    folders = {path.name for path in TEMPLATES.iterdir() if path.is_dir()}
    assert folders == set(re.findall(r"\]\((\w[\w-]*)/?\)", page)) & folders


def test_options_have_names_that_airflow_s_beam_operators_can_write() -> None:
    """They turn a mapping into flags: snake_case names; true and false into a bare flag or none."""
    import argparse

    parser = argparse.ArgumentParser(add_help=False)
    TrainOptions._add_argparse_args(parser)
    for action in parser._actions:
        assert re.fullmatch(r"--[a-z_]+", action.option_strings[0])
        assert action.nargs in (None, 0)


# --- Beam YAML -----------------------------------------------------------------------------------------------------

#: What a parameter of a YAML transform is called as an option, where that differs.
AS_OPTION = {
    "index": "training_index",
    "field": "training_field",
    "size": "max_training_vector_count",
    "sample_size": "max_training_vector_count",
    "folder": "temp_location",
    "threads": "training_threads",
    "url": "opensearch_url",
    "route": "publish",
}
#: Options that YAML has no parameter for: the first are in the `request`, the rest are knn-train's own to do.
IN_THE_REQUEST = {"space_type", "method", "mode", "compression_level", "engine", "description", "search_size"}
NOT_IN_YAML = {
    *("preference", "node_id", "parquet", "vector_column", "reader", "slices", "max_requests_in_flight"),
    *(
        "accelerator",
        "max_bad_vectors",
        "model_dir",
        "overwrite",
        "resume",
        "use_all_vectors",
        "allow_large_model",
        "niter",
        "nredo",
    ),
    *("eval_vectors", "min_recall", "max_imbalance", "compare_to", "only_if_better", "suggest", "max_bytes_per_vector"),
}


def yaml_transforms() -> dict[str, type[beam.PTransform]]:
    return {
        name: kind
        for name, kind in vars(transforms_yaml).items()
        if isinstance(kind, type) and issubclass(kind, beam.PTransform) and kind.__module__ == transforms_yaml.__name__
    }


def test_the_provider_offers_every_yaml_transform_and_no_other() -> None:
    (provider,) = yaml.safe_load((TEMPLATES / "beam-yaml/providers.yaml").read_text())
    assert provider["transforms"] == {name: f"transforms.yaml.{name}" for name in yaml_transforms()}


def test_every_option_is_a_yaml_parameter_or_known_not_to_be() -> None:
    """A new option must be given to YAML, or be said here not to be for it."""
    parameters = set()
    for kind in yaml_transforms().values():
        own = list(inspect.signature(kind.__init__).parameters)[1:]
        documented = re.findall(r"^ {2}(\w+): ", inspect.getdoc(kind) or "", re.MULTILINE)
        assert not documented or documented == own
        parameters |= {AS_OPTION.get(name, name) for name in own}
    options = {action.dest for action in flex_template.actions()} | {"temp_location"}
    assert parameters | IN_THE_REQUEST | NOT_IN_YAML == options
    assert not parameters & (IN_THE_REQUEST | NOT_IN_YAML)
