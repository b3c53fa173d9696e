# SPDX-License-Identifier: Apache-2.0
"""Runs whose steps are executed elsewhere: what they need, how they are cancelled, and what their failures mean."""

from __future__ import annotations

import argparse
import re
import time
from contextlib import suppress
from typing import Any

import grpc
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, PortableOptions, StandardOptions
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.runner import PipelineState, create_runner

from transforms.errors import RequestError, TrainingError

_REMOTE = ("dataflow", "flink", "portable", "spark")

#: Seconds that a job server has to answer, and a cancelled job to end.
_PATIENCE = 20.0


def is_remote(options: PipelineOptions) -> bool:
    """Whether the runner executes steps in processes that it starts itself."""
    runner = options.view_as(StandardOptions).runner or ""
    return runner.rpartition(".")[2].lower().removesuffix("runner") in _REMOTE


def check(options: PipelineOptions) -> None:
    """Looks for what a run cannot do without, before anything is done.

    Raises:
      RequestError: there is no such runner, it lacks an option, or there is no folder to share.
      TrainingError: the job server does not answer. Beam itself would wait five minutes for it.
    """
    name = options.view_as(StandardOptions).runner
    if name is None:
        return
    try:
        runner = create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise RequestError(f"--runner {name}: {error}") from None
    if is_remote(options) and options.view_as(GoogleCloudOptions).temp_location is None:
        raise RequestError(f"--runner {name} needs --temp_location, a folder that all workers share")
    wrong = PipelineOptionsValidator(options, runner).validate()
    if wrong:
        raise RequestError(f"--runner {name}: " + "; ".join(" ".join(each.split()).rstrip(".") for each in wrong))
    if not is_remote(options):
        return
    job_endpoint = options.view_as(PortableOptions).job_endpoint
    if job_endpoint not in (None, "embed"):
        _describe(job_endpoint)


def add_flags(parser: argparse.ArgumentParser, job_endpoint: str) -> None:
    """Adds the flags of the runner behind a job server, which Beam sends on when it submits.

    Raises:
      TrainingError: the job server does not answer.
    """
    for option in _describe(job_endpoint).options:
        is_switch = option.type == beam_job_api_pb2.PipelineOptionType.BOOLEAN
        with suppress(argparse.ArgumentError):  # Beam has it too
            parser.add_argument(f"--{option.name}", action="store_true" if is_switch else "store")


def _describe(job_endpoint: str) -> Any:
    request = beam_job_api_pb2.DescribePipelineOptionsRequest()
    try:
        with grpc.insecure_channel(job_endpoint) as channel:
            grpc.channel_ready_future(channel).result(_PATIENCE)
            return beam_job_api_pb2_grpc.JobServiceStub(channel).DescribePipelineOptions(request, timeout=_PATIENCE)
    except (grpc.RpcError, grpc.FutureTimeoutError):
        raise TrainingError(f"no job server answers at --job_endpoint {job_endpoint}") from None


def wait(result: Any) -> None:
    """Waits for the end of the run; cancels the job if that is interrupted.

    Beam's job server for Flink (2.70) says that a job is cancelled and leaves it running on the cluster. Its steps end
    themselves when they find that the run's folder is gone.
    """
    try:
        result.wait_until_finish()
    except KeyboardInterrupt:
        deadline = time.monotonic() + _PATIENCE
        with suppress(Exception):  # the server may be gone: then there is nothing to cancel
            result.cancel()
            while not PipelineState.is_terminal(result.state) and time.monotonic() < deadline:
                time.sleep(0.2)
        raise


def reason(text: str) -> str:
    """The line that matters in what a runner reports of a failure: a Java trace around a Python one, or either."""
    if re.search(r"ModuleNotFoundError: No module named '(?:pipelines|transforms)", text):
        return "the workers do not have this package: submit with --setup_file ./setup.py or --extra_package WHEEL"
    text = re.sub(r"^Pipeline \S+ failed in state \w+: ", "", text)
    raised = re.findall(r"^(?:Caused by: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$", text, re.MULTILINE)
    line = raised[-1] if raised else text.strip().partition("\n")[0]
    return re.sub(r" \[while running .*", "", line)
