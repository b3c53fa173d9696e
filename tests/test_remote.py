# SPDX-License-Identifier: Apache-2.0
"""What can be said of remote runs without a cluster; tests/test_flink.py has one."""

from __future__ import annotations

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines import remote
from pipelines.options import parse
from transforms.errors import RequestError, TrainingError


@pytest.mark.parametrize("runner", ["PortableRunner", "FlinkRunner", "flink", "apache_beam.runners.DataflowRunner"])
def test_a_remote_run_needs_a_shared_folder(runner: str) -> None:
    with pytest.raises(RequestError, match=f"--runner {runner} needs --temp_location, a folder that all workers share"):
        remote.check(PipelineOptions(["--runner", runner]))
    if "Dataflow" not in runner:
        remote.check(PipelineOptions(["--runner", runner, "--temp_location", "/shared"]))


def test_a_runner_that_there_is_not() -> None:
    with pytest.raises(RequestError, match=r"^--runner Foo: Unexpected pipeline runner: Foo\. Valid values are"):
        remote.check(PipelineOptions(["--runner", "Foo"]))


def test_all_that_dataflow_lacks_is_told() -> None:
    flags = ["--runner=DataflowRunner", "--temp_location=/shared", "--project=p", "--region=r"]
    with pytest.raises(
        RequestError, match=r"^--runner DataflowRunner: Invalid GCS path \(/shared\).*Invalid Project ID"
    ):
        remote.check(PipelineOptions(flags))


@pytest.mark.parametrize("flags", [[], ["--runner=FnApiRunner"], ["--runner=DirectRunner"], ["--runner=PrismRunner"]])
def test_a_local_run_does_not(flags: list[str]) -> None:
    remote.check(PipelineOptions(flags))


def test_no_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    flags = ["--runner=PortableRunner", "--job_endpoint=localhost:9", "--temp_location=/shared"]
    with pytest.raises(TrainingError, match=r"no job server answers at --job_endpoint localhost:9$"):
        remote.check(parse(flags)[0])
    with pytest.raises(TrainingError, match=r"no job server answers at --job_endpoint localhost:9$"):
        parse([*flags, "--a_flag_of_the_runner=1"])


PYTHON = """Pipeline p failed in state FAILED: java.lang.RuntimeException: Error received from SDK harness for \
instruction 3: Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1512, in apache_beam.runners.common.DoFnRunner.process
OSError: [Errno 28] No space left on device [while running 'Write spill files']

\tat org.apache.beam.runners.fnexecution.control.FnApiControlClient.get(FnApiControlClient.java:12)
"""
JAVA = """Pipeline p failed in state FAILED: org.apache.flink.client.program.ProgramInvocationException: Job failed
\tat org.apache.flink.client.program.rest.RestClusterClient.lambda$submitJob$11(RestClusterClient.java:433)
Caused by: org.apache.flink.runtime.jobmaster.JobMasterException: TaskManager with id tm1 is no longer reachable.
\tat org.apache.flink.runtime.jobmaster.JobMaster.lambda$0(JobMaster.java:1)
"""


LOST = "org.apache.flink.runtime.io.network.netty.exception.RemoteTransportException: Connection unexpectedly closed"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"Pipeline p failed in state FAILED: {LOST}", LOST),
        (PYTHON, "OSError: [Errno 28] No space left on device"),
        (
            JAVA,
            "org.apache.flink.runtime.jobmaster.JobMasterException: TaskManager with id tm1 is no longer reachable.",
        ),
        (
            PYTHON.replace(
                "OSError: [Errno 28] No space left on device", "ModuleNotFoundError: No module named 'pipelines'"
            ),
            "the workers do not have this package: submit with --setup_file ./setup.py or --extra_package WHEEL",
        ),
        ("interrupted", "interrupted"),
    ],
)
def test_one_line_of_what_a_runner_says(text: str, line: str) -> None:
    assert remote.reason(text) == line
