# SPDX-License-Identifier: Apache-2.0
"""A Flink cluster of separate processes, as a user has one: JobManager, two TaskManagers and Beam's job server.

Python workers are started by the TaskManagers through Beam's own boot program, each in an environment that has Beam
and the package's dependencies but not the package: that arrives with the job.

`python -m tests.runners.flink_cluster` runs one until Ctrl-C and says how to submit to it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import psutil

from tests.opensearch_home import Missing, fetch
from tests.opensearch_server import die_with_parent, java_homes, java_version
from tests.runners import CACHE, call, go_install, once

FLINK = "1.19.3"  # its JARs are on PyPI, in apache-flink-libraries
JOB_SERVER = [
    # The newest runner for Flink 1.19 that is published in parts; a newer Python SDK may submit to it.
    "org.apache.beam:beam-runners-flink-1.19:2.70.0",
    "org.apache.beam:beam-runners-java-job-service:2.65.0",
    "org.slf4j:slf4j-simple:2.0.16",
]
RESTARTS = 1  # of a job, after a failure; Flink's own default is none
START_TIMEOUT = 120.0

# What Flink's own start scripts pass (env.java.opts.all), for Java 17.
_OPENS = ("lang", "net", "io", "nio", "lang.reflect", "text", "time", "util", "util.concurrent")
_OPENS += ("util.concurrent.atomic", "util.concurrent.locks")
JAVA_OPTIONS = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _OPENS]
JAVA_OPTIONS += ["--add-exports=java.base/sun.net.util=ALL-UNNAMED", "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED"]

LOGGING = """\
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
appender.console.name = console
appender.console.type = CONSOLE
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %-5p %c{1} %m%n
"""

# Boot sees an environment of its own for each worker, as in a container; making one takes 0.1 s. It has what this one
# has except the package under test: that is installed as a link, and Python follows no links in a folder that is itself
# named by one.
#
# Beam's program does not notice when a TaskManager is killed, and its worker waits for ever. In a container all would
# die together; here the TaskManager is watched. SIGTERM ends the program and its worker.
BOOT = """\
#!/bin/sh
set -e
own=$(mktemp -d {run_dir}/worker-XXXXXX)
{python} -m venv --without-pip "$own/python"
site=$("$own/python/bin/python" -c 'import site; print(site.getsitepackages()[0])')
printf '%s\\n' {packages} "import watched_worker" > "$site/dependencies.pth"
cp {watched_worker} "$site"
export ELEMENT_SIZES={run_dir}/element-sizes
(while kill -0 $PPID && kill -0 $$; do sleep 1; done; kill $$) > /dev/null 2>&1 &
export PATH="$own/python/bin:$PATH" RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
exec {boot} --semi_persist_dir="$own" "$@" > "$own.log" 2>&1
"""


def job_server() -> Path:
    """The folder with the JARs of Beam's job server."""

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            fetch(Path(scratch), {"job-server": JOB_SERVER})["job-server"].rename(folder / "lib")

    return once(CACHE / "flink-job-server", build) / "lib"


def job_server_jar(folder: Path) -> Path:
    """A JAR in `folder` that stands for all of the job server, as Beam's `--flink_job_server_jar` wants one."""
    opens = [option.partition("=")[2].partition("=")[0] for option in JAVA_OPTIONS if option.startswith("--add-opens")]
    manifest = {
        "Manifest-Version": "1.0",
        "Main-Class": "org.apache.beam.runners.flink.FlinkJobServerDriver",
        "Class-Path": " ".join(jar.as_uri() for jar in sorted(job_server().glob("*.jar"))),
        "Add-Opens": " ".join(opens),
    }
    lines = [f"{name}: {value}" for name, value in manifest.items()]
    # A line of a manifest has 72 bytes; one that begins with a space goes on with the one before.
    wrapped = ["\r\n ".join([line[:70], *re.findall(".{1,69}", line[70:])]) for line in lines]
    jar = folder / "job-server.jar"
    with zipfile.ZipFile(jar, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", "\r\n".join([*wrapped, "", ""]))
    return jar


def flink() -> Path:
    """The folder with Flink's own JARs."""

    def build(folder: Path) -> None:
        (folder / "bin").mkdir()
        (folder / "lib").mkdir()
        # Not log4j-1.2-api: nothing here logs through it.
        wanted = re.compile(
            r"deps/((?:bin/bash-java-utils|lib/flink-dist|lib/log4j-(?:api|core|slf4j-impl))[-.\d]*jar)$"
        )
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            requirement = f"apache-flink-libraries=={FLINK}"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
            call([*pip, "--no-build-isolation", "--dest", scratch, requirement])
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                for member in archive:
                    if (found := wanted.search(member.name)) and (content := archive.extractfile(member)):
                        with content, (folder / found[1]).open("wb") as jar:
                            shutil.copyfileobj(content, jar)

    return once(CACHE / f"flink-{FLINK}", build)


def find_java() -> str:
    """The oldest Java here that Flink 1.19 runs on."""
    fitting = [(version, home) for home in java_homes() if 11 <= (version := java_version(home)) <= 21]
    if not fitting:
        raise Missing(f"Flink {FLINK} needs Java 11 to 21: none found")
    return str(min(fitting)[1] / "bin" / "java")


class FlinkCluster:
    """`with closing(FlinkCluster()) as cluster: cluster.start()`; `close` ends all processes, workers too."""

    def __init__(self, task_managers: int = 2) -> None:
        self._size = task_managers
        self._java = find_java()
        self._flink, self._job_server = flink(), job_server()
        boot = go_install("python/container")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._task_managers: list[subprocess.Popen[bytes]] = []  # those killed too
        self.run_dir = Path(tempfile.mkdtemp(prefix="flink-"))
        self._conf = self.run_dir / "conf"
        self._conf.mkdir()
        (self.run_dir / "tmp").mkdir()
        (self._conf / "log4j.properties").write_text(LOGGING)
        self._boot = self.run_dir / "boot.sh"
        quoted = {"run_dir": self.run_dir, "python": sys.executable, "packages": sysconfig.get_path("purelib")}
        quoted |= {"boot": boot, "watched_worker": Path(__file__).with_name("watched_worker.py")}
        self._boot.write_text(BOOT.format(**{name: shlex.quote(str(value)) for name, value in quoted.items()}))
        self._boot.chmod(0o755)
        self._rpc, self.rest_port, self._jobs, self._artifacts = free_ports(4)

    @property
    def options(self) -> list[str]:
        """What to tell `knn-train` so that it runs there."""
        return ["--runner=PortableRunner", self.job_endpoint, *self.environment]

    @property
    def job_endpoint(self) -> str:
        """The flag that names its job server."""
        return f"--job_endpoint=localhost:{self._jobs}"

    @property
    def environment(self) -> list[str]:
        """The flags that say how its workers are started, and how many."""
        config = json.dumps({"command": str(self._boot)})
        return ["--environment_type=PROCESS", f"--environment_config={config}", f"--parallelism={self._size}"]

    def start(self) -> None:
        (self._conf / "config.yaml").write_text(self._settings())
        manager, master = "JobManager", f"localhost:{self.rest_port}"
        main = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        self._flink_process(manager, main, "GET_JM_RESOURCE_PARAMS", ["--executionMode", "cluster"])
        for _ in range(self._size):
            self.add_task_manager()
        driver = ["org.apache.beam.runners.flink.FlinkJobServerDriver", f"--flink-master={master}"]
        ports = [f"--job-port={self._jobs}", f"--artifact-port={self._artifacts}", "--expansion-port=-1"]
        staging = f"--artifacts-dir={self.run_dir}/artifacts"
        self._process("JobServer", ["-Xmx384m", *JAVA_OPTIONS], f"{self._job_server}/*", [*driver, *ports, staging])
        self._wait("the job server", lambda: _listens(self._jobs))
        self._wait("the TaskManagers", lambda: self.overview()["slots-total"] == self._size)

    def add_task_manager(self) -> None:
        """Starts one more. The kernel ends it together with the thread that calls this."""
        name = f"TaskManager-{len(self._task_managers) + 1}"
        main = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
        self._flink_process(name, main, "GET_TM_RESOURCE_PARAMS", ["-D", f"taskmanager.resource-id={name}"])
        self._task_managers.append(self._processes[-1])

    def kill_task_manager(self) -> None:
        """kill -9 of the one that was started last. Its Python workers are not touched."""
        self._processes.remove(self._task_managers[-1])
        self._task_managers[-1].kill()
        self._task_managers[-1].wait()

    def overview(self) -> dict[str, int]:
        """What the cluster says of itself."""
        with urllib.request.urlopen(f"http://localhost:{self.rest_port}/overview", timeout=5) as answer:
            found: dict[str, int] = json.load(answer)
        return found

    def workers(self, module: str = "") -> list[psutil.Process]:
        """The processes that boot programs have started, or those that run `module`.

        Boot puts each worker into a process group of its own; their PATH tells that they are ours.
        """
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("PATH", "").startswith(f"{self.run_dir}/worker-")
                if ours and (not module or module in process.cmdline()):
                    found.append(process)
        return found

    def largest_element(self) -> int:
        """Bytes of the largest element that any worker has sent, as encoded for the wire; 0 if none was sent."""
        with suppress(FileNotFoundError):
            return max(map(int, (self.run_dir / "element-sizes").read_text().split()))
        return 0

    def close(self) -> None:
        """Ends all at once: nothing here is worth an orderly end."""
        for process in reversed(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()
        for process in self.workers():
            with suppress(psutil.Error):
                process.kill()
                process.wait(10)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _settings(self) -> str:
        return "\n".join(
            f"{name}: {value}"
            for name, value in {
                "jobmanager.rpc.address": "localhost",
                "jobmanager.rpc.port": self._rpc,
                "jobmanager.bind-host": "localhost",
                "jobmanager.memory.process.size": "700m",
                "jobmanager.execution.failover-strategy": "region",
                "rest.address": "localhost",
                "rest.port": self.rest_port,
                "rest.bind-address": "localhost",
                "taskmanager.host": "localhost",
                "taskmanager.bind-host": "localhost",
                "taskmanager.numberOfTaskSlots": 1,
                "taskmanager.memory.process.size": "1100m",
                "taskmanager.memory.managed.size": "128m",  # off-heap memory is what Flink makes it
                "taskmanager.memory.jvm-overhead.max": "128m",
                "taskmanager.memory.jvm-overhead.min": "128m",
                "restart-strategy.type": "fixed-delay",
                "restart-strategy.fixed-delay.attempts": RESTARTS,
                "restart-strategy.fixed-delay.delay": "8 s",  # when it is known that a TaskManager has gone
                "heartbeat.interval": 2000,
                "heartbeat.timeout": 10_000,
                "io.tmp.dirs": self.run_dir / "tmp",
            }.items()
        )

    def _flink_process(self, name: str, main: str, sizes: str, arguments: list[str]) -> None:
        # Flink's start scripts ask this program for the memory options; one that is missing ends a TaskManager.
        utils = f"{self._flink}/bin/*:{self._flink}/lib/flink-dist-{FLINK}.jar"
        program = "org.apache.flink.runtime.util.bash.BashJavaUtils"
        conf = ["--configDir", str(self._conf)]
        text = subprocess.run(
            [self._java, "-cp", utils, program, sizes, *conf], check=True, capture_output=True, text=True
        ).stdout
        jvm, dynamic = re.findall(r"^BASH_JAVA_UTILS_EXEC_RESULT:(.*)$", text, re.MULTILINE)
        logging = [f"-Dlog4j.configurationFile=file:{self._conf}/log4j.properties"]
        options = [*jvm.split(), "-XX:+UseSerialGC", *JAVA_OPTIONS, *logging]
        self._process(name, options, f"{self._flink}/lib/*", [main, *conf, *arguments, *dynamic.split()])

    def _process(self, name: str, options: list[str], class_path: str, arguments: list[str]) -> None:
        with (self.run_dir / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [self._java, f"-Djava.io.tmpdir={self.run_dir}/tmp", *options, "-cp", class_path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.run_dir,
                env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LANG": "C.UTF-8"},
                start_new_session=True,
                preexec_fn=die_with_parent(),  # only makes system calls
            )
        self._processes.append(process)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in self._processes):
                break
            with suppress(OSError):
                if ready():
                    return
            time.sleep(0.2)
        tails = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.run_dir.glob("*.log"))
        raise RuntimeError(f"{what} did not come up:\n{tails}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on: all are held until the last is found, so they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _listens(port: int) -> bool:
    with socket.create_connection(("localhost", port), 1):
        return True


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with closing(FlinkCluster()) as cluster, suppress(KeyboardInterrupt):
        cluster.start()
        print(f"Flink is at http://localhost:{cluster.rest_port}, logs are in {cluster.run_dir}. Submit with")
        print("knn-train", shlex.join(cluster.options), "--setup_file=./setup.py ...", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
